"""Segments of DASH: where the audio is cut, and which video belongs to a piece of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omnisieve.layout import Modality, Segments, TokenLayout
from omnisieve.ops.segmentation import greedy_cuts
from omnisieve.ops.similarity import cosine


@dataclass(frozen=True)
class AudioCuts:
    """Where the audio changes.

    Attributes:
        audio: [B, I, L], what is cut: items, or all audio of a sample as published.
        starts: [B, I, L] bool, tokens that a segment begins with.
        boundary: [B, I, L], how likely a token begins something, in [0, 1].
    """

    audio: Segments
    starts: Tensor
    boundary: Tensor

    @staticmethod
    def of(embeds: Tensor, audio: Segments, threshold: float, least: int) -> AudioCuts:
        """Cut where the cosine of neighbours is below `threshold`, every `least` tokens at most."""
        tokens = audio.gather(embeds)
        likeness = cosine(tokens[:, :, 1:], tokens[:, :, :-1])
        change = torch.nn.functional.pad(likeness < threshold, (1, 0), value=False)
        boundary = torch.nn.functional.pad(((1 - likeness) / 2).clamp(0, 1), (1, 0), value=1.0)
        return AudioCuts(audio, greedy_cuts(change & audio.valid, least) & audio.valid, boundary)

    def segment(self) -> Tensor:
        """Segment of each token, [B, I, L] long, counted over the sample; 0 also where there is none."""
        return (self.starts.flatten(1).long().cumsum(dim=1) - 1).clamp(min=0).view_as(self.starts)

    def total(self, values: Tensor) -> Tensor:
        """Sum of [B, I, L] over each segment, [B, I * L], of which the first entries are in use."""
        values = torch.where(self.audio.valid, values, 0).float().flatten(1)
        return torch.zeros_like(values).scatter_add(1, self.segment().flatten(1), values)

    def retention(self, keep: Tensor) -> Tensor:
        """Kept share of each segment's audio, [B, I * L] float64; 0.5 where there is none."""
        kept, size = self.total(self.audio.gather(keep)), self.total(self.audio.valid)
        return torch.where(size > 0, kept / size.clamp(min=1), 0.5).double()


def segments_of_frames(cuts: AudioCuts, layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Give every frame to the segment that sounds in its middle.

    Returns:
        [B, F] each: the segment as `AudioCuts.segment` counts them, -1 without sound; whether a frame is the first of
        its segment and item; whether it is the second, fourth, ...
    """
    places = layout.places(layout.segments("frame", Modality.VIDEO))
    heard, opens_item = (
        torch.from_numpy(x).to(cuts.starts.device, non_blocking=True) for x in (heard_at(layout), places == 0)
    )
    segment = cuts.audio.scatter(cuts.segment(), -1).gather(1, heard.clamp(min=0)).masked_fill(heard < 0, -1)
    first = opens_item | (segment != segment.roll(1, dims=1))
    place = torch.arange(first.shape[1], device=first.device)
    since = place - torch.where(first, place, 0).cummax(dim=1).values
    return segment, first, since % 2 == 1


def heard_at(layout: TokenLayout) -> np.ndarray:
    """Position of the last audio token up to the middle of each frame, [B, F] on the host; -1 without any.

    Only audio on the clock of the video counts.
    """
    frames = layout.segments("frame", Modality.VIDEO)
    sample = np.arange(layout.batch_size)[:, None]
    time, clock = layout.time[sample, frames.first], sample * layout.length + layout.stream[sample, frames.first]
    place = layout.places(frames)
    # A frame lasts until the next one; the last of an item, as long as the one before it.
    followed = np.pad((place[:, 1:] > 0) & (frames.sizes[:, 1:] > 0), ((0, 0), (0, 1)))
    lasts = np.where(followed, np.roll(time, -1, axis=1) - time, 0)
    lasts = np.where(followed | (place == 0), lasts, np.roll(lasts, 1, axis=1))

    audio = np.nonzero(layout.modality == Modality.AUDIO)
    sound_clock = audio[0] * layout.length + layout.stream[audio]
    horizon = 2 * layout.time.max(initial=0) + 1  # no frame ends behind it
    moment = sound_clock * horizon + layout.time[audio]
    order = np.argsort(moment, kind="stable")
    latest = np.searchsorted(moment[order], clock * horizon + time + lasts / 2, side="right") - 1
    # One token of no clock stands for what comes before all audio.
    latest = np.append(order, -1)[latest]
    same = np.append(sound_clock, -1)[latest] == clock
    return np.where(same & (frames.sizes > 0), np.append(audio[1], -1)[latest], -1)


@dataclass(frozen=True)
class HalfGrids:
    """The published cuts of the video. Frames are half a grid long and counted from the first token of a segment;
    what is left of a segment is in none.

    Attributes:
        frames: [B, F, P]; how many there are is not known on the host, where every size is that of a frame.
        segment: [B, F] long, the segment of each frame.
        odd: [B, F] bool, the second, fourth, ... frame of its segment.
        whole: [B, S] bool, video tokens of segments too short for two frames.
        starts: [B, V] bool, video tokens that a segment begins with.
    """

    frames: Segments
    segment: Tensor
    odd: Tensor
    whole: Tensor
    starts: Tensor


def half_grids(audio_starts: Tensor, layout: TokenLayout) -> HalfGrids:
    """Carry the cuts of the audio over to the video.

    Audio cut b becomes video cut floor(b * video tokens / audio tokens); cuts that coincide become one, and segments
    are counted on, so that from there on the video is one segment behind.

    Args:
        audio_starts: [B, N] bool, audio tokens that a segment begins with.
        layout: of the batch.
    """
    device = audio_starts.device
    video = layout.segments("all", Modality.VIDEO)
    longest = video.index.shape[-1]
    n_video, n_audio = (layout.counts(m) for m in (Modality.VIDEO, Modality.AUDIO))
    sampled = 2 * (layout.segments("frame", Modality.VIDEO).sizes > 0).sum(axis=1)
    per_frame = np.maximum(n_video // np.maximum(sampled, 1), 1)
    most = max(int((n_video // per_frame).max()), 1)
    size, total, sound = (
        torch.from_numpy(n[:, None]).to(device, non_blocking=True) for n in (per_frame, n_video, n_audio.clip(1))
    )

    cut = torch.arange(audio_starts.shape[-1], device=device) * total // sound
    starts = torch.zeros(len(n_video), longest + 1, dtype=torch.bool, device=device)
    # One place past the end takes what is no cut.
    starts = starts.scatter(1, cut.masked_fill(~audio_starts, longest).clamp(max=longest), True)
    starts[:, 0] = True
    place = torch.arange(longest, device=device).expand(len(n_video), -1)
    begin = torch.where(starts[:, :-1], place, 0).cummax(dim=1).values
    end = torch.where(starts[:, 1:], place + 1, longest).flip(1).cummin(dim=1).values.flip(1).minimum(total)
    inside, several = place < total, end - begin >= 2 * size
    ordinal = (place - begin) // size
    first = inside & several & ((place - begin) % size == 0) & (begin + (ordinal + 1) * size <= end)

    order = (~first).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    offset = torch.arange(int(per_frame.max()), device=device)
    valid = first.gather(1, order).unsqueeze(-1) & (offset < size.unsqueeze(-1))
    slot = (order.unsqueeze(-1) + offset).clamp(max=longest - 1)
    index = video.index[:, 0].gather(1, slot.flatten(1)).view_as(slot)
    sizes = np.tile(per_frame[:, None], most)
    return HalfGrids(
        frames=Segments(index.masked_fill(~valid, 0), valid, sizes, np.zeros_like(sizes), layout.length),
        segment=(starts[:, :-1].long().cumsum(dim=1) - 1).gather(1, order),
        odd=ordinal.gather(1, order) % 2 == 1,
        whole=video.scatter((inside & ~several).unsqueeze(1), False),
        starts=starts[:, :-1] & inside,
    )
