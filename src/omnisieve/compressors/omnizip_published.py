"""What OmniZip's published functions do with windows and their budgets, kept apart from the robust rules."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omnisieve.layout import Modality, Segments, TokenLayout

TOLERANCE = 1e-3  # discrepancies of the budget below it are left alone


@dataclass(frozen=True)
class Cuts:
    """Windows of both modalities and the frames of the video.

    Attributes:
        video, audio: [B, W, L] windows; segment w of both is the same window.
        frames: [B, F, P].
        equal_weights: every window weighs the same in the budget (else: by its video tokens).
        whole: [B, W] bool on the host: windows whose video is not pruned at all.
    """

    video: Segments
    audio: Segments
    frames: Segments
    equal_weights: bool
    whole: np.ndarray

    @staticmethod
    def of(layout: TokenLayout) -> Cuts:
        """2-s windows and temporal grids."""
        video, audio = (layout.segments("window", m) for m in (Modality.VIDEO, Modality.AUDIO))
        frames = layout.segments("frame", Modality.VIDEO)
        return Cuts(video, audio, frames, False, np.zeros(video.sizes.shape, dtype=bool))

    def per_frame(self, values: Tensor) -> Tensor:
        """Values of windows [B, W] for each of their frames, [B, F]."""
        tokens = self.video.scatter(values.unsqueeze(-1).expand(self.video.index.shape), 0.0)
        return self.frames.gather(tokens)[..., 0]

    def odd_frames(self) -> Tensor:
        """[B, F, 1] bool: the second, fourth, ... frame of its window."""
        slot = torch.arange(self.video.index.shape[-1], device=self.video.index.device)
        first = self.frames.gather(self.video.scatter(slot.expand(self.video.index.shape), 0))[..., 0]
        size = torch.from_numpy(self.frames.sizes).to(first.device, non_blocking=True).clamp(min=1)
        return (first // size % 2 == 1).unsqueeze(-1)


def half_grid_cuts(layout: TokenLayout) -> Cuts:
    """The cuts of the first release, which counts sampled frames and so takes half a grid for a frame.

    Four such frames make a window when their number divides by four, and audio is cut into as many parts. Otherwise
    four frames go with 50 audio tokens, and what is left of either is one more window, whose video stays whole.
    """
    member = {m: layout.modality == m for m in (Modality.VIDEO, Modality.AUDIO)}
    ordinal = {m: np.cumsum(member[m], axis=1) - 1 for m in member}
    n_video, n_audio = (layout.counts(m)[:, None] for m in member)
    sampled = 2 * (layout.segments("frame", Modality.VIDEO).sizes > 0).sum(axis=1, keepdims=True)
    per_frame = np.maximum(n_video // np.maximum(sampled, 1), 1)
    even = sampled % 4 == 0
    count = np.where(even, sampled // 4, np.minimum(n_video // (4 * per_frame), n_audio // 50))
    length = {
        Modality.VIDEO: np.where(even, n_video // np.maximum(count, 1), 4 * per_frame),
        Modality.AUDIO: np.where(even, n_audio // np.maximum(count, 1), 50),
    }
    last = np.maximum(np.where(even, count - 1, count), 0)
    windows = int(last.max()) + 1
    video, audio = (
        layout.cut(np.where(member[m], np.minimum(ordinal[m] // np.maximum(length[m], 1), last), -1), windows)
        for m in member
    )
    frame = np.where(member[Modality.VIDEO], ordinal[Modality.VIDEO] // per_frame, -1)
    return Cuts(video, audio, layout.cut(frame, int(frame.max(initial=0)) + 1), True, video.sizes != 4 * per_frame)


def frozen_extremes(rate: Tensor, asked: float, low: float, high: float, cuts: Cuts) -> Tensor:
    """Scale window rates to the asked one as published: once, then one additive correction, both clamped.

    The first window with the smallest and the first with the largest rate keep theirs. One or two windows are not
    scaled at all, and what the clamps cut off is lost.

    Args:
        rate: [B, W] float64, removed share that each window's audio suggests.
        asked: removed share that is asked for.
        low, high: clamps.
        cuts: the windows.

    Returns:
        [B, W] float64, the removed share of each window's video.
    """
    audio, video = cuts.audio.sizes > 0, cuts.video.sizes > 0
    # Without audio: the first release takes a window for fully heard, the current one leaves it out of the scaling.
    present = audio | video if cuts.equal_weights else audio & video
    rate = torch.where(_to(audio, rate), rate, low if cuts.equal_weights else asked)
    weight = _to(present * (1.0 if cuts.equal_weights else cuts.video.sizes), rate).double()
    inside = _to(present, rate)
    target = asked * weight.sum(dim=-1, keepdim=True)
    discard = (rate * weight).sum(dim=-1, keepdim=True)

    smallest = rate.masked_fill(~inside, torch.inf).argmin(dim=-1, keepdim=True)
    largest = rate.masked_fill(~inside, -torch.inf).argmax(dim=-1, keepdim=True)
    others = inside.scatter(-1, smallest, False).scatter(-1, largest, False)
    frozen = sum((rate * weight).gather(-1, at) for at in (smallest, largest))
    free = torch.where(others, rate * weight, 0).sum(dim=-1, keepdim=True)
    scaled = torch.where(others, (rate * ((target - frozen) / free)).clamp(low, high), rate)
    missing = target - (scaled * weight).sum(dim=-1, keepdim=True)
    shift = missing / torch.where(others, weight, 0).sum(dim=-1, keepdim=True)
    shifted = torch.where(others & (missing.abs() > TOLERANCE), (scaled + shift).clamp(low, high), scaled)

    enough = _to(present.sum(axis=1, keepdims=True) > 2, rate)
    applies = enough & ((discard - target).abs() > TOLERANCE) & (free > 0)
    return torch.where(applies, shifted, rate).masked_fill(_to(cuts.whole, rate), 0.0)


def _to(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(array)).to(like.device, non_blocking=True)
