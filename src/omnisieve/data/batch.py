"""What flows from the data side to a model: one `Sample` per conversation, one `Batch` per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from omnisieve.data.errors import OF_THE_SAMPLE, SampleError
from omnisieve.layout import Modality, TokenLayout, TokenMap


@dataclass(frozen=True)
class Patches:
    """Preprocessed frames of one video, or one image.

    Attributes:
        pixels: [t * h * w, channels * temporal_patch * patch * patch], in the order the vision tower expects.
        grid: (t, h, w) in patches, before spatial merging.
        seconds_per_grid: seconds between two temporal grid steps; 0 for an image.
    """

    pixels: Tensor
    grid: tuple[int, int, int]
    seconds_per_grid: float = 0.0


@dataclass(frozen=True)
class Features:
    """Frozen-encoder outputs of a sample or of a batch, in sequence order; a modality that is absent is None.

    Attributes:
        video, audio, image: [tokens, D] each.
        extra: further per-token arrays by name, e.g. encoder saliency: "video/NAME" [Nv, ...], "audio/NAME".
    """

    video: Tensor | None = None
    audio: Tensor | None = None
    image: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def join(parts: Sequence[Features]) -> Features | None:
        """The rows of several in one, in order; None of none."""
        if not parts:
            return None
        names = sorted({name for part in parts for name in part.extra})
        extra = {name: _concatenate([part.extra.get(name) for part in parts]) for name in names}
        return Features(
            video=_concatenate([part.video for part in parts]),
            audio=_concatenate([part.audio for part in parts]),
            image=_concatenate([part.image for part in parts]),
            extra={name: values for name, values in extra.items() if values is not None},
        )

    def without(self, modalities: Set[Modality]) -> Features:
        """The same features but for those of `modalities`."""
        gone = {modality.name.lower() for modality in modalities}
        extra = {name: values for name, values in self.extra.items() if name.split("/")[0] not in gone}
        return replace(self, extra=extra, **dict.fromkeys(gone))

    def to(self, device: Any, *, non_blocking: bool = False) -> Features:
        return _map_tensors(self, lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Features:
        return _map_tensors(self, lambda t: t.pin_memory())


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used.

    Attributes:
        id: of its conversation.
        path, kind, reason, cure: see `errors.SampleError`.
        replacement: id of the sample that stands in its place.
    """

    id: str
    path: str
    kind: str
    reason: str
    cure: str
    replacement: str

    @property
    def key(self) -> tuple[str, ...]:
        """The same for the same fault: of a file, or of a sample."""
        return (self.path, self.id) if self.kind in OF_THE_SAMPLE else (self.path,)

    def __str__(self) -> str:
        return (
            f"replaced sample {self.id} by {self.replacement}: "
            f"{SampleError(self.path, self.kind, self.reason, self.cure)}"
        )


@dataclass(frozen=True)
class LoweredFps:
    """A sample whose videos are read at a lower frame rate, because it would be too long.

    Attributes:
        id: of its conversation.
        paths: of its videos. fps_was, fps: frames per second of each, before and now.
        tokens_was, tokens: of the whole sample, before compression.
    """

    id: str
    paths: tuple[str, ...]
    fps_was: tuple[float, ...]
    fps: tuple[float, ...]
    tokens_was: int
    tokens: int

    @property
    def key(self) -> tuple[str, ...]:
        """The same for the same sample."""
        return (self.id, *self.paths)

    def __str__(self) -> str:
        rates = ", ".join(f"{was:.3g} to {now:.3g}" for was, now in zip(self.fps_was, self.fps, strict=True))
        return f"sample {self.id}: {self.tokens_was} tokens are too many, {self.tokens} at fewer fps ({rates})"


@dataclass(frozen=True)
class Sample:
    """One conversation, ready for collation. S is its length with all placeholders in place.

    Attributes:
        id: the manifest line's id (its line number when it has none).
        input_ids: [S] long.
        labels: [S] long, the token's own id where it belongs to an answer, -100 elsewhere (not shifted).
        position_ids: [3, S] long, or float32 where ids may be fractions: temporal, height and width rope ids.
        tokens: what each token is.
        videos, images: patches in sequence order (empty with `features`).
        audios: mel spectrograms [mel bins, mel frames] in sequence order, a video's sound at its place.
        video_grids, image_grids: (t, h, w) per item, also with `features`.
        seconds_per_grid: one per video.
        features: cached encoder outputs instead of patches and mel spectrograms.
        meta: the manifest line's other keys (`family`, `evidence`, `question`, `answer`, ...).
        failures: samples that could not be read and that this one stands for.
        lowered: the frame rate that it was brought to because it would be too long.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    tokens: TokenMap
    videos: tuple[Patches, ...] = ()
    images: tuple[Patches, ...] = ()
    audios: tuple[Tensor, ...] = ()
    video_grids: tuple[tuple[int, int, int], ...] = ()
    image_grids: tuple[tuple[int, int, int], ...] = ()
    seconds_per_grid: tuple[float, ...] = ()
    features: Features | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    failures: tuple[BadSample, ...] = ()
    lowered: LoweredFps | None = None


@dataclass(frozen=True)
class Batch:
    """Samples padded to one length S. Media are concatenated in batch order, then in sequence order.

    Attributes:
        input_ids, attention_mask, labels: [B, S] long; labels are -100 outside answers and are not shifted.
        position_ids: [3, B, S], computed per sample: silent and sounding videos may share a batch.
        layout: what each token is, on the host.
        pixel_values_videos: [patches, dim] of all videos. video_grid_thw: [videos, 3] long.
        video_second_per_grid: [videos] float.
        pixel_values: [patches, dim] of all images. image_grid_thw: [images, 3] long.
        input_features: [audios, mel bins, T] float, zero-padded at the end.
        feature_attention_mask: [audios, T] long.
        features: cached encoder outputs; pixels and mel spectrograms are None then.
        answer_tokens: labels that are not -100, per sample, counted on the host.
        ids, meta: per sample, see `Sample`.
        failures: all samples that were replaced.
        lowered: all samples that are read at a lower frame rate.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    position_ids: Tensor
    layout: TokenLayout
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None
    video_second_per_grid: Tensor | None = None
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    input_features: Tensor | None = None
    feature_attention_mask: Tensor | None = None
    features: Features | None = None
    answer_tokens: tuple[int, ...] = ()
    ids: tuple[str, ...] = ()
    meta: tuple[Mapping[str, Any], ...] = ()
    failures: tuple[BadSample, ...] = ()
    lowered: tuple[LoweredFps, ...] = ()

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def to_encode(self) -> frozenset[Modality]:
        """Media that are here as pixels or mel spectrograms."""
        inputs = {
            Modality.IMAGE: self.pixel_values,
            Modality.VIDEO: self.pixel_values_videos,
            Modality.AUDIO: self.input_features,
        }
        return frozenset(modality for modality, values in inputs.items() if values is not None)

    def to(self, device: Any, *, non_blocking: bool = True) -> Batch:
        """The same batch on `device`; the layout's uploads will go there, too."""
        moved = _map_tensors(self, lambda t: t.to(device, non_blocking=non_blocking))
        features = self.features.to(device, non_blocking=non_blocking) if self.features else None
        return replace(moved, layout=self.layout.to(device), features=features)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; `DataLoader(pin_memory=True)` calls this."""
        features = self.features.pin_memory() if self.features else None
        return replace(_map_tensors(self, lambda t: t.pin_memory()), features=features)

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the stock model's forward; what is absent is left out."""
        names = (
            "input_ids", "attention_mask", "position_ids", "pixel_values_videos", "video_grid_thw",
            "video_second_per_grid", "pixel_values", "image_grid_thw", "input_features",
            "feature_attention_mask",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _concatenate(values: Sequence[Tensor | None]) -> Tensor | None:
    present = [value for value in values if value is not None]
    return torch.cat(present) if present else None


def _map_tensors(record: Any, function: Any) -> Any:
    """Apply `function` to every tensor field, and to the tensors of mappings."""
    changes: dict[str, Any] = {}
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            changes[item.name] = function(value)
        elif isinstance(value, Mapping):
            changes[item.name] = {k: function(v) if isinstance(v, Tensor) else v for k, v in value.items()}
    return replace(record, **changes)
