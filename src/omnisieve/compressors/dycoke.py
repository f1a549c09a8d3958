"""DyCoke's temporal merging: of four frames one stays whole, the others keep what changed (arXiv 2411.15024).

Within every group of four frames of an item the second is compared with the first, the third with the first and the
fourth with the third, each as it was before anything was dropped; patches with the lowest cosine to the one at the
same place stay. Nothing is merged in spite of the name, and a quarter of the video always stays. A frame is one grid
here. `dycoke` leaves audio whole, or drops it at random if `audio_ratio` says so. `dycoke_va` treats 2-s windows of
audio as frames, tokens at the same offset being compared.

`rounding="official"` reproduces the published function: a pruned frame keeps int((1 - k) n) tokens of n, where
(1 + 3 (1 - k)) / 4 is the asked share; the third frame of the last group stays whole and an odd last frame goes
entirely (a frame that is all there is stays; the published function fails on it). `rounding="exact"` treats the last
group like the others. Groups are four grids whatever time they span, and windows of audio 2 s by time, under either
rounding. Dropping in the KV cache while decoding is not part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from omnisieve.compressors.base import Compressor, Needs, Settings, drop_share, register
from omnisieve.compressors.random import random_scores
from omnisieve.compressors.ranked import Ranked
from omnisieve.layout import MEDIA, Modality, SegmentKind, Segments, TokenLayout
from omnisieve.ops.budget import floor_product, largest_remainder, round_count
from omnisieve.ops.similarity import cosine

BACK = np.array([0, 1, 2, 1])
"""How many frames earlier the frame is that each of a group of four is compared with."""


@register("dycoke_va")
class DyCokeVa(Compressor):
    """Both modalities. See the module's docstring."""

    segment_kinds: ClassVar[Mapping[Modality, SegmentKind]] = {Modality.VIDEO: "frame", Modality.AUDIO: "window"}
    compared: ClassVar[tuple[Modality, ...]] = MEDIA

    def rank(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> tuple[Ranked, Ranked]:
        """Every fourth frame whole, and of the others first what changes. See `Compressor.rank`."""
        video, audio = (self.ranked(m, self.scores_of(m, embeds, layout), layout, 1.0) for m in MEDIA)
        return video, audio

    def scores_of(self, modality: Modality, embeds: Tensor, layout: TokenLayout) -> Tensor:
        """Dissimilarity to the frame that each token's frame is compared with, [B, S]."""
        frames = self.segments_of(modality, layout)
        place = layout.places(frames)
        source = np.arange(place.shape[1]) - BACK[place % 4]
        at = torch.from_numpy(source).to(embeds.device, non_blocking=True)[..., None]
        tokens = frames.gather(embeds)
        change = 1 - cosine(tokens, tokens.gather(1, at.unsqueeze(-1).expand_as(tokens)))
        # What has no counterpart is taken for unrelated.
        return frames.scatter(torch.where(frames.valid.gather(1, at.expand_as(change)), change, 1.0), 0.0)

    def least(self, modality: Modality, layout: TokenLayout) -> np.ndarray:
        """The first frame of every group, or a quarter."""
        if modality not in self.compared:
            return super().least(modality, layout)
        if self.settings.rounding == "official":
            return round_count(layout.counts(modality) / 4)
        return self._whole(layout, self.segments_of(modality, layout)).sum(axis=1)

    def counts_of(self, modality: Modality, layout: TokenLayout) -> np.ndarray:
        """Kept tokens per frame, [B, F]."""
        if modality not in self.compared or self.settings.rounding == "official":
            return super().counts_of(modality, layout)
        frames = self.segments_of(modality, layout)
        whole = self._whole(layout, frames)
        return whole + largest_remainder(self.asked(layout).of(modality) - whole.sum(axis=1), frames.sizes - whole)

    def official_counts(self, modality: Modality, layout: TokenLayout, sizes: np.ndarray) -> np.ndarray:
        """As published, with what happens at the end of an item."""
        share = self.shares_of(modality, layout)
        if modality not in self.compared:
            return np.maximum(floor_product(sizes, share), np.minimum(sizes, 1))
        dropped = drop_share(np.round((4 * share - 1) / 3, 12)).clip(0, 1)
        frames = self.segments_of(modality, layout)
        place, left = layout.places(frames), _frames_left(layout, frames)
        whole = (place % 4 == 0) | ((place % 4 == 2) & (left < 2))
        lost = (place % 2 == 0) & (place > 0) & (left == 0)
        # Binary fractions of 1 - k included.
        return np.where(whole, sizes, floor_product(sizes, 1.0 - dropped)) * ~lost

    def _whole(self, layout: TokenLayout, frames: Segments) -> np.ndarray:
        """Tokens of the frames that are never pruned, [B, F]; 0 for the others."""
        return frames.sizes * (layout.places(frames) % 4 == 0)


@dataclass(frozen=True, kw_only=True)
class DyCokeSettings(Settings):
    """Settings of DyCoke.

    Attributes:
        seed: of the audio that is dropped where `audio_ratio` asks for it.
    """

    seed: int = 0


@register("dycoke")
class DyCoke(DyCokeVa):
    """Video only. See the module's docstring."""

    settings: DyCokeSettings
    settings_type = DyCokeSettings
    audio_intact = True
    segment_kinds: ClassVar[Mapping[Modality, SegmentKind]] = {Modality.VIDEO: "frame", Modality.AUDIO: "all"}
    compared = (Modality.VIDEO,)

    def scores_of(self, modality: Modality, embeds: Tensor, layout: TokenLayout) -> Tensor:
        """Change of video; random numbers for audio, [B, S]."""
        if modality == Modality.AUDIO:
            return random_scores(layout, self.settings.seed)
        return super().scores_of(modality, embeds, layout)


def _frames_left(layout: TokenLayout, frames: Segments) -> np.ndarray:
    """How many frames of the same item follow each frame, [B, F]."""
    place = layout.places(frames)
    item = np.cumsum(place == 0, axis=1) - 1
    last = np.zeros_like(place)
    np.maximum.at(last, (np.arange(len(place))[:, None], item), np.where(frames.sizes > 0, place, 0))
    return np.take_along_axis(last, item, axis=1) - place
