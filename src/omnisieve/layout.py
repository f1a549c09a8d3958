"""What each token of a batch is: modality, media item, frame, row, column, time and window.

A compression method never sees `input_ids`, grids or model classes. It sees embeddings [B, S, D] and a
`TokenLayout`. The maps live on the host as numpy arrays, where every size that a tensor shape depends on is read
from them; what a method needs on the device is uploaded on first use and kept. Nothing is ever read back, so
planning never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Literal
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from omnisieve.ops.estimators import token_noise
from omnisieve.ops.segments import Segments as Segments
from omnisieve.ops.segments import pack

SegmentKind = Literal["window", "frame", "frames", "run", "flat", "all"]


class Modality(IntEnum):
    """What a token carries. Only video and audio tokens are ever dropped."""

    PADDING = 0
    TEXT = 1
    IMAGE = 2
    VIDEO = 3
    AUDIO = 4


MEDIA = (Modality.VIDEO, Modality.AUDIO)


@dataclass(frozen=True)
class TokenMap:
    """The tokens of one sample, int64 [S] each; -1 where a field has no meaning (text).

    Attributes:
        modality: a `Modality` value.
        item: running index of the media item within the sample.
        frame: temporal grid step within the item (0 for audio).
        row, column: position in the merged patch grid.
        time: temporal position id relative to the start of the item's stream.
        stream: items that share one clock share a stream: a video and its own sound do, a separate audio file
            has a stream of its own.
    """

    modality: np.ndarray
    item: np.ndarray
    frame: np.ndarray
    row: np.ndarray
    column: np.ndarray
    time: np.ndarray
    stream: np.ndarray

    def __len__(self) -> int:
        return len(self.modality)


_MAPS = (*(item.name for item in fields(TokenMap)), "window")


@dataclass(frozen=True)
class TokenLayout:
    """Maps of a batch, [B, S] int64 each, on the host; `device` is where uploads go.

    `window` numbers the 2-s windows of a sample over all its streams. A window is cut by temporal position, so it
    exists whenever it has a token of either modality, also when a capped frame rate left it without a grid. `names` are
    the ids of the samples, for messages; empty where they are not known.
    """

    modality: np.ndarray
    item: np.ndarray
    frame: np.ndarray
    row: np.ndarray
    column: np.ndarray
    time: np.ndarray
    stream: np.ndarray
    window: np.ndarray
    names: tuple[str, ...] = ()
    device: torch.device = torch.device("cpu")
    _uploads: dict = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def stack(
        samples: Sequence[TokenMap],
        *,
        length: int | None = None,
        padding_side: Literal["left", "right"] = "right",
        ids_per_window: int = 50,
        names: Sequence[str] = (),
    ) -> TokenLayout:
        """Pad the maps of several samples to one batch.

        Args:
            samples: one map per sample.
            length: S; the longest sample when None.
            padding_side: where padding goes, as in the batch's `input_ids`.
            ids_per_window: temporal position ids in one window (25 ids per second, 2 s).
            names: ids of the samples.
        """
        longest = max(len(sample) for sample in samples)
        length = longest if length is None else length
        if length < longest:
            raise ValueError(f"length {length} is shorter than the longest sample ({longest} tokens)")
        maps: dict[str, Any] = {name: np.full((len(samples), length), -1) for name in _MAPS}
        maps["modality"].fill(Modality.PADDING)
        for row, sample in enumerate(samples):
            place = slice(0, len(sample)) if padding_side == "right" else slice(length - len(sample), length)
            for item in fields(TokenMap):
                maps[item.name][row, place] = getattr(sample, item.name)
            maps["window"][row, place] = _windows(sample, ids_per_window)
        return TokenLayout(**maps, names=tuple(names))

    @property
    def batch_size(self) -> int:
        return self.modality.shape[0]

    @property
    def length(self) -> int:
        return self.modality.shape[1]

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout with uploads going to `device`."""
        maps = {name: getattr(self, name) for name in _MAPS}
        return TokenLayout(**maps, names=self.names, device=torch.device(device))

    def select(self, index: np.ndarray) -> TokenLayout:
        """The layout of the samples `index` (host indices into the batch, repeats allowed)."""
        maps = {name: getattr(self, name)[index] for name in _MAPS}
        names = tuple(self.names[i] for i in index) if self.names else ()
        return TokenLayout(**maps, names=names, device=self.device)

    def name_of(self, sample: int) -> str:
        """What a message calls a sample: its id, or else its index in the batch."""
        return self.names[sample] if self.names else str(sample)

    def noise(self, seed: int) -> Tensor:
        """A random number for each token, [B, S] float32 in [0, 1).

        It depends on the seed, on the sample's id (without ids: its index) and on the token's place in the sample, but
        not on what else is in the batch.
        """
        keys = np.array([crc32(f"{seed} {self.name_of(i)}".encode()) for i in range(self.batch_size)], dtype=np.uint64)
        first = (self.modality != Modality.PADDING).argmax(axis=1)
        places = (np.arange(self.length) - first[:, None]).astype(np.uint64)
        return self._to_device(token_noise(keys[:, None], places))

    def counts(self, *modalities: Modality) -> np.ndarray:
        """Tokens per sample that belong to any of `modalities`, int64 [B]."""
        return np.isin(self.modality, modalities).sum(axis=1)

    def mask(self, *modalities: Modality) -> Tensor:
        """[B, S] bool on the device: tokens that belong to any of `modalities`."""
        return self._upload(("mask", modalities), lambda: np.isin(self.modality, modalities))

    def previous_frame_token(self, within: Literal["window", "item"] = "window") -> Tensor:
        """[B, S] long on the device: position of the co-located token one frame earlier, -1 if there is none.

        Only video tokens have one: same item, same row and column, frame - 1 and, with `within="window"`, in the
        same window.
        """
        return self._upload(("previous", within), lambda: _previous_frame_token(self, within))

    def segments(self, kind: SegmentKind, modality: Modality, size: int | None = None) -> Segments:
        """Cut one modality's tokens.

        Args:
            kind: "window" 2-s windows (segment g of video and of audio is the same window); "frame" one temporal
                grid each; "frames" groups of `size` consecutive grids of an item; "run" contiguous runs in the
                sequence; "flat" `size` tokens each in sequence order; "all" one segment per sample.
            modality: whose tokens.
            size: see `kind`.

        Returns:
            segments with [B, G, L] indices; G and L are at least 1.
        """
        key = ("segments", kind, modality, size)
        if key not in self._uploads:
            owner = _segment_ids(self, kind, modality, size)
            groups = int(self.window.max()) + 1 if kind == "window" else int(owner.max()) + 1
            self._uploads[key] = self._segments(*pack(owner, max(groups, 1)))
        return self._uploads[key]

    def by_grid_pairs(self) -> TokenLayout:
        """The same layout whose windows are pairs of consecutive grids of a video, whatever time they span.

        Audio belongs to the pair that began last before it, on its own clock or an earlier one; audio before all video
        makes a window without video. At two grids in 2 s these are the 2-s windows.
        """
        key = ("grid pairs",)
        if key not in self._uploads:
            self._uploads[key] = replace(self, window=_grid_pairs(self), _uploads={})
        return self._uploads[key]

    def cut(self, owner: np.ndarray, groups: int) -> Segments:
        """Cuts of one's own making, not kept.

        Args:
            owner: [B, S] on the host, segment of each token, below `groups`; -1 for none.
            groups: G.
        """
        return self._segments(*pack(owner, groups))

    def derived(self, key: tuple[Hashable, ...], build: Callable[[], np.ndarray]) -> Tensor:
        """An array on the device that follows from the layout, built and uploaded on first use.

        Args:
            key: names the array and everything else that it depends on, a method's settings for instance.
            build: makes it on the host.
        """
        return self._upload(("derived", *key), build)

    def places(self, segments: Segments) -> np.ndarray:
        """Number of each segment within its media item, [B, G] int64 on the host.

        Counting begins where an item has its first tokens; a segment without tokens counts to the item before it.

        Args:
            segments: cuts that do not mix items.
        """
        own = self.item[np.arange(self.batch_size)[:, None], segments.first]
        item = np.maximum.accumulate(np.where(segments.sizes > 0, own, -1), axis=1)
        number = np.broadcast_to(np.arange(item.shape[1]), item.shape)
        starts = np.diff(item, axis=1, prepend=-1) != 0
        return number - np.maximum.accumulate(np.where(starts, number, 0), axis=1)

    def canvas(self) -> tuple[Segments, int, int]:
        """Video frames laid out as images for convolutions.

        Returns:
            segments of kind "frame" whose slot is `row * width + column` on a canvas of the batch's largest grid
            (cells that a frame does not have are invalid), the canvas height and its width.
        """
        key = ("canvas",)
        if key not in self._uploads:
            owner = _segment_ids(self, "frame", Modality.VIDEO, None)
            height, width = (int(m[owner >= 0].max(initial=0)) + 1 for m in (self.row, self.column))
            cell = self.row * width + self.column
            packed = pack(owner, max(int(owner.max()) + 1, 1), cell, height * width)
            self._uploads[key] = (self._segments(*packed), height, width)
        return self._uploads[key]

    def _segments(self, index: np.ndarray, valid: np.ndarray, sizes: np.ndarray) -> Segments:
        first = np.take_along_axis(index, valid.argmax(axis=-1)[..., None], axis=-1)[..., 0]
        return Segments(self._to_device(index), self._to_device(valid), sizes, first, self.length)

    def _upload(self, key: tuple, build: Callable[[], np.ndarray]) -> Tensor:
        if key not in self._uploads:
            self._uploads[key] = self._to_device(build())
        return self._uploads[key]

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def _windows(sample: TokenMap, ids_per_window: int) -> np.ndarray:
    """Window index per token, [S]; -1 for what is neither video nor audio."""
    media = np.isin(sample.modality, MEDIA)
    window = np.full(len(sample), -1, dtype=np.int64)
    chunk = sample.time[media] // ids_per_window
    key = sample.stream[media] * (chunk.max(initial=0) + 1) + chunk
    window[media] = np.unique(key, return_inverse=True)[1]
    return window


def _grid_pairs(layout: TokenLayout) -> np.ndarray:
    """Number of each media token's pair of grids in its sample, [B, S]; -1 for what is neither video nor audio."""
    frames = layout.segments("frame", Modality.VIDEO)
    opens = (frames.sizes > 0) & (layout.places(frames) % 2 == 0)
    sample = np.arange(layout.batch_size)[:, None]
    # Samples follow each other, and so do the clocks of their streams.
    clock = sample * (int(layout.stream.max(initial=0)) + 1) + layout.stream
    moment = clock * (int(layout.time.max(initial=0)) + 1) + layout.time
    begun = np.searchsorted(moment[sample, frames.first][opens], moment, side="right")
    earlier = np.cumsum(opens.sum(axis=1)) - opens.sum(axis=1)
    number = begun - earlier[:, None]
    media = np.isin(layout.modality, MEDIA)
    # Counted from 0, which is 1 pair begun unless something sounds before all video.
    least = np.where(media, number, number.max(initial=0)).min(axis=1, keepdims=True)
    return np.where(media, number - least, -1)


def _previous_frame_token(layout: TokenLayout, within: str) -> np.ndarray:
    video = layout.modality == Modality.VIDEO
    coordinates = [layout.item, layout.frame, layout.row, layout.column]
    radix = [int(c.max(initial=0)) + 2 for c in coordinates]
    batch, position = np.nonzero(video)
    out = np.full(layout.modality.shape, -1, dtype=np.int64)
    if not len(batch):
        return out

    def key(frame_shift: int) -> np.ndarray:
        code = batch.copy()
        for axis, (values, base) in enumerate(zip(coordinates, radix, strict=True)):
            # + 1 keeps frame -1, which no token has, from aliasing another item's last frame.
            code = code * base + values[batch, position] + 1 - (frame_shift if axis == 1 else 0)
        return code

    own = key(0)
    order = np.argsort(own)
    wanted = key(1)
    slot = np.minimum(np.searchsorted(own[order], wanted), len(own) - 1)
    found = order[slot]
    hit = own[found] == wanted
    if within == "window":
        hit &= layout.window[batch[found], position[found]] == layout.window[batch, position]
    out[batch[hit], position[hit]] = position[found[hit]]
    return out


def _segment_ids(layout: TokenLayout, kind: SegmentKind, modality: Modality, size: int | None) -> np.ndarray:
    """Segment index per token [B, S], increasing along the sequence of a sample; -1 outside the modality."""
    member = layout.modality == modality
    if kind in ("frames", "flat") and (size is None or size < 1):
        raise ValueError(f"segments of kind {kind!r} need size >= 1, got {size}")
    if kind == "window":
        return np.where(member, layout.window, -1)
    if kind == "all":
        return np.where(member, 0, -1)
    ordinal = np.cumsum(member, axis=1) - 1
    if kind == "flat":
        return np.where(member, ordinal // (size or 1), -1)
    if kind == "run":
        starts = member & ~np.pad(member, ((0, 0), (1, 0)))[:, :-1]
        return np.where(member, np.cumsum(starts, axis=1) - 1, -1)
    group = layout.frame // (size or 1) if kind == "frames" else layout.frame
    key = np.where(member, layout.item * (int(group.max(initial=0)) + 1) + group, -1)
    # A new segment starts where the key differs from that of the previous token of the modality.
    last = np.maximum.accumulate(np.where(member, np.arange(layout.length), -1), axis=1)
    previous = np.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    previous_key = np.where(previous >= 0, np.take_along_axis(key, np.maximum(previous, 0), axis=1), -1)
    starts = member & (key != previous_key)
    return np.where(member, np.cumsum(starts, axis=1) - 1, -1)
