"""DivPrune: the most diverse tokens of each frame and of each 2 s of audio.

Greedy max-min selection in cosine distance (DivPrune, arXiv 2503.02175), in the omni-modal adaptation that SEATS
describes: video per temporal grid, audio per window, on embeddings after the projectors. The published code selects
one picture at a time and may pick a duplicate twice; ours handles all segments together and never does.
`divprune_om` prunes both modalities; `divprune` leaves audio whole unless `audio_ratio` says otherwise.
`rounding="official"` keeps round(ratio * n) of a segment. Windows last 2 s by time under either rounding: the
adaptation has no published code that would cut them otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from omnisieve.compressors.base import Compressor, Needs, register
from omnisieve.compressors.ranked import Ranked
from omnisieve.layout import MEDIA, Modality, SegmentKind, TokenLayout
from omnisieve.ops.budget import round_product
from omnisieve.ops.diversity import maxmin_mask, maxmin_rank
from omnisieve.plan import Plan


@register("divprune_om")
class DivPruneOm(Compressor):
    """Both modalities. See the module's docstring."""

    segment_kinds: ClassVar[Mapping[Modality, SegmentKind]] = {Modality.VIDEO: "frame", Modality.AUDIO: "window"}

    def plan(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> Plan:
        """Keep what differs most from what is kept. See `Compressor.plan`."""
        video, audio = (self._diverse(modality, embeds, layout) for modality in MEDIA)
        return self.make_plan(layout, video | audio)

    def rank(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> tuple[Ranked, Ranked]:
        """In the order of picking, which goes on until no token is left. See `Compressor.rank`."""
        return self._in_order(Modality.VIDEO, embeds, layout), self._in_order(Modality.AUDIO, embeds, layout)

    def official_counts(self, modality: Modality, layout: TokenLayout, sizes: np.ndarray) -> np.ndarray:
        """round(ratio * n), halves to even, binary fractions included."""
        return round_product(sizes, self.shares_of(modality, layout))

    def _diverse(self, modality: Modality, embeds: Tensor, layout: TokenLayout) -> Tensor:
        segments, counts = self.segments_of(modality, layout), self.counts_of(modality, layout)
        wanted = torch.from_numpy(counts).to(embeds.device, non_blocking=True)
        chosen = maxmin_mask(segments.gather(embeds), segments.valid, wanted, int(counts.max()))
        return segments.scatter(chosen, False)

    def _in_order(self, modality: Modality, embeds: Tensor, layout: TokenLayout) -> Ranked:
        segments = self.segments_of(modality, layout)
        picked = maxmin_rank(segments.gather(embeds), segments.valid)
        return self.ranked(modality, segments.scatter(-picked.float(), 0.0), layout, None)


@register("divprune")
class DivPrune(DivPruneOm):
    """Video only. See the module's docstring."""

    audio_intact = True
