"""winDivPrune: per window and modality, the most diverse tokens, those that the encoder attends to before others.

SEATS' first stage (section 4.1): greedy max-min selection in cosine distance inside 2-s windows, where the attention
that a candidate receives in the encoder scales its distances. `rounding="official"` cuts windows as the published code
does, every two grids and every 50 audio tokens, and keeps max(1, round(ratio * n)) of each. These are 2 s of
Qwen2.5-Omni below the frame cap; grids that are spread out last longer, and 50 audio tokens of Qwen3-Omni near 4 s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omnisieve.compressors.base import Compressor, Need, Needs, Settings, register
from omnisieve.compressors.ranked import Ranked
from omnisieve.layout import MEDIA, Modality, SegmentKind, Segments, TokenLayout
from omnisieve.ops.budget import round_product
from omnisieve.ops.diversity import maxmin_mask, maxmin_rank
from omnisieve.plan import Plan

PUBLISHED_WINDOW: Mapping[Modality, tuple[SegmentKind, int]] = {
    Modality.VIDEO: ("frames", 2),
    Modality.AUDIO: ("flat", 50),
}


@dataclass(frozen=True, kw_only=True)
class WinDivPruneSettings(Settings):
    """Settings of winDivPrune.

    Attributes:
        attention_weighted: False takes diversity alone, and computes no encoder attention.
    """

    attention_weighted: bool = True


@register("windivprune")
class WinDivPrune(Compressor):
    """See the module's docstring; settings in `WinDivPruneSettings`."""

    settings: WinDivPruneSettings
    settings_type = WinDivPruneSettings

    @property
    def needs(self) -> tuple[Need, ...]:
        """Attention received within a window; only tokens of one window are compared."""
        if not self.settings.attention_weighted:
            return ()
        return tuple(Need("attention_received", modality, "window") for modality in MEDIA)

    def plan(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> Plan:
        """Keep what differs most from what is kept. See `Compressor.plan`."""
        keep = torch.zeros_like(layout.mask(*MEDIA))
        for modality in MEDIA:
            segments, counts = self.segments_of(modality, layout), self.counts_of(modality, layout)
            weight = self._weight(modality, segments, needs)
            wanted = torch.from_numpy(counts).to(embeds.device, non_blocking=True)
            chosen = maxmin_mask(segments.gather(embeds), segments.valid, wanted, int(counts.max()), weight)
            keep = keep | segments.scatter(chosen, False)
        return self.make_plan(layout, keep)

    def rank(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> tuple[Ranked, Ranked]:
        """In the order of picking, which goes on until no token is left. See `Compressor.rank`."""
        parts = []
        for modality in MEDIA:
            segments = self.segments_of(modality, layout)
            weight = self._weight(modality, segments, needs)
            picked = maxmin_rank(segments.gather(embeds), segments.valid, weight)
            parts.append(self.ranked(modality, segments.scatter(-picked.float(), 0.0), layout, None))
        return parts[0], parts[1]

    def segments_of(self, modality: Modality, layout: TokenLayout) -> Segments:
        """2-s windows."""
        if self.settings.rounding == "official":
            kind, size = PUBLISHED_WINDOW[modality]
            return layout.segments(kind, modality, size)
        return layout.segments("window", modality)

    def official_counts(self, modality: Modality, layout: TokenLayout, sizes: np.ndarray) -> np.ndarray:
        """max(1, round(ratio * n)), halves to even, binary fractions included."""
        rounded = round_product(sizes, self.shares_of(modality, layout))
        return np.clip(rounded, np.minimum(sizes, 1), sizes)

    def _weight(self, modality: Modality, segments: Segments, needs: Needs | None) -> Tensor | None:
        """What scales the distances of a candidate, [B, G, L]."""
        if not self.settings.attention_weighted:
            return None
        return segments.gather(self.statistic(needs, Need("attention_received", modality, "window")))
