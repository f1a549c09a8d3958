"""Audio kept with anchors, and video budgets that follow the audio: what OmniZip and DASH share.

Audio: the best-scored tokens stay. Of the rest, evenly spaced anchors stay as well; each takes up the few tokens
nearest to it that resemble the video most (OmniZip, arXiv 2511.14582).

Under official rounding anchors come on top of the audio budget. Under exact rounding they count as kept audio, and
frames share the video budget by the removal rates that a method suggests: all rates are shifted together until the
total is exact (water-filling), and frames are rounded by largest remainder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from omnisieve.compressors.base import Budget, Compressor, CompressorError, Need, Needs, Settings, drop_share
from omnisieve.compressors.ranked import Ranked
from omnisieve.compressors.saliency import relative_to_window
from omnisieve.layout import Modality, SegmentKind, Segments, TokenLayout
from omnisieve.ops.budget import round_product
from omnisieve.ops.merge import merge_into_anchors, spaced_anchors
from omnisieve.ops.similarity import unit
from omnisieve.ops.topk import Scale, tiered, topk_mask
from omnisieve.ops.waterfill import round_to_total, water_fill
from omnisieve.plan import Merge

Scope = Literal["window", "file"]


@dataclass(frozen=True, kw_only=True)
class AnchorSettings(Settings):
    """Settings of methods with audio anchors.

    Attributes:
        scope: what audio attention ranges over: "window" or "file" (published). None: "file" under official rounding,
            else "window".
        merge_scope: the video that tokens to be merged are compared with: "window" (their own) or "file". None: as
            for `scope`.
        contextual_ratio: share of audio tokens that become anchors.
        merge_group: tokens merged into an anchor, at most (3; 15 for AVUT); 0: none.
        neighbours: whose distance makes a video token stand out (5).
        rho_min, rho_max: bounds of the removed share of a window's video.
        headroom: how far the bounds stay away from the asked removed share, at least (exact rounding only).
    """

    scope: Scope | None = None
    merge_scope: Scope | None = None
    contextual_ratio: float = 0.05
    merge_group: int = 3
    neighbours: int = 5
    rho_min: float = 0.35
    rho_max: float = 0.75
    headroom: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scope", "merge_scope"):
            if getattr(self, name) not in (None, "window", "file"):
                raise CompressorError(f"{name} is {getattr(self, name)!r}; choose 'window' or 'file'")
        if not 0 <= self.rho_min <= self.rho_max <= 1:
            raise CompressorError(f"need 0 <= rho_min <= rho_max <= 1, got {self.rho_min}, {self.rho_max}")
        for name, least in (("contextual_ratio", 0), ("merge_group", 0), ("neighbours", 1), ("headroom", 0)):
            if getattr(self, name) < least:
                raise CompressorError(f"{name} is {getattr(self, name)}; it must be at least {least}")


class KeptAudio(NamedTuple):
    """Audio tokens that stay, [B, S] bool each, none in both."""

    best: Tensor
    anchors: Tensor

    @property
    def mask(self) -> Tensor:
        """All of them."""
        return self.best | self.anchors


class AnchoredAudio(Compressor):
    """Base of methods with audio anchors."""

    settings: AnchorSettings
    settings_type = AnchorSettings
    segment_kinds: ClassVar[Mapping[Modality, SegmentKind]] = {Modality.VIDEO: "frame", Modality.AUDIO: "all"}

    @property
    def official(self) -> bool:
        """Whether the published functions are reproduced."""
        return self.settings.rounding == "official"

    @property
    def scope(self) -> Scope:
        """See `AnchorSettings`."""
        return self.settings.scope or ("file" if self.official else "window")

    @property
    def merge_scope(self) -> Scope:
        """See `AnchorSettings`."""
        return self.settings.merge_scope or ("file" if self.official else "window")

    @property
    def keeps_bare_anchors(self) -> bool:
        """Whether there are anchors although nothing is merged into them (`merge_group` 0)."""
        return False

    @property
    def needs(self) -> tuple[Need, ...]:
        """Attention that audio tokens receive in the encoder."""
        return (Need("attention_received", Modality.AUDIO, "global" if self.scope == "file" else "encoder"),)

    def attention(self, needs: Needs | None, layout: TokenLayout) -> Tensor:
        """Attention that audio tokens receive, comparable within `scope`, [B, S]."""
        attention = self.statistic(needs, self.needs[0])
        return relative_to_window(attention, layout) if self.scope == "window" else attention

    # Audio.

    def budget(self, layout: TokenLayout) -> Budget:
        """Kept tokens; under official rounding the video count depends on the content, this is its upper bound."""
        return replace(super().budget(layout), exact=not self.official)

    def official_counts(self, modality: Modality, layout: TokenLayout, sizes: np.ndarray) -> np.ndarray:
        """Audio with its anchors; of video all, unless a method knows a lower bound."""
        if modality == Modality.AUDIO:
            best, anchors = self.audio_counts(layout)
            return (best + anchors)[:, None]
        return sizes

    def audio_counts(self, layout: TokenLayout) -> tuple[np.ndarray, np.ndarray]:
        """Best-scored tokens and anchors per sample, [B] each."""
        s, size = self.settings, layout.counts(Modality.AUDIO)
        anchors = round_product(size, s.contextual_ratio) * (s.merge_group > 0 or self.keeps_bare_anchors)
        if self.official:
            # As published, binary fractions included.
            best = round_product(size, 1.0 - drop_share(self.ratio_of(Modality.AUDIO)))
            return best, np.minimum(anchors, size - best)
        total = self.asked(layout).audio
        # Anchors never take more than half of what is kept.
        anchors = np.minimum(np.minimum(anchors, size - total), total // 2)
        return total - anchors, anchors

    def choose_audio(self, scores: Tensor, layout: TokenLayout, scale: Scale = 0.0) -> KeptAudio:
        """The best-scored audio tokens, and anchors among the rest; `scale` as of `Ranked`."""
        best_count, anchor_count = self.audio_counts(layout)
        whole = layout.segments("all", Modality.AUDIO)
        counts = torch.from_numpy(best_count[:, None]).to(scores.device, non_blocking=True)
        best = whole.scatter(topk_mask(whole.gather(scores), whole.valid, counts, scale), False)
        if not anchor_count.any():
            return KeptAudio(best, torch.zeros_like(best))
        rest = layout.mask(Modality.AUDIO) & ~best
        return KeptAudio(best, spaced_anchors(rest, layout.counts(Modality.AUDIO) - best_count, anchor_count))

    def rank_audio(self, kept: KeptAudio, scores: Tensor, layout: TokenLayout, scale: Scale = 0.0) -> Ranked:
        """The best, then anchors, then the rest; each of them by score. See `choose_audio`."""
        whole = layout.segments("all", Modality.AUDIO)
        counts = torch.from_numpy(np.sum(self.audio_counts(layout), axis=0)[:, None])
        tier = whole.gather(2 * kept.best.long() + kept.anchors.long())
        order = whole.scatter(tiered(tier, whole.gather(scores), whole.valid, scale), 0.0)
        return Ranked(whole, counts.to(scores.device, non_blocking=True), order, None)

    def merge_audio(self, kept: KeptAudio, embeds: Tensor, layout: TokenLayout) -> Merge | None:
        """What is merged into the anchors."""
        anchor_count = self.audio_counts(layout)[1]
        if not anchor_count.any():
            return None
        whole, anchors = layout.segments("all", Modality.AUDIO), kept.anchors
        rest = layout.mask(Modality.AUDIO) & ~kept.best
        # Merging sees audio tokens only, [B, N].
        position = whole.index[:, 0]
        tokens, anchor, pool, likeness = (
            whole.gather(values)[:, 0] for values in (embeds, anchors, rest & ~anchors, self._likeness(embeds, layout))
        )
        present = whole.valid[:, 0]
        source, target, weight, own = merge_into_anchors(
            tokens, anchor & present, pool & present, likeness, int(anchor_count.max()), self.settings.merge_group
        )
        source, target = position.gather(1, source), position.gather(1, target)
        return Merge(source, target, weight, whole.scatter(own.unsqueeze(1), 1.0))

    def _likeness(self, embeds: Tensor, layout: TokenLayout) -> Tensor:
        """Largest cosine of each audio token to the video in scope, [B, S]; -inf where there is no video."""
        kind: SegmentKind = "window" if self.merge_scope == "window" else "all"
        audio, video = (layout.segments(kind, m) for m in (Modality.AUDIO, Modality.VIDEO))
        cosines = unit(audio.gather(embeds)) @ unit(video.gather(embeds)).transpose(-1, -2)
        return audio.scatter(cosines.masked_fill(~video.valid.unsqueeze(-2), -torch.inf).amax(dim=-1), -torch.inf)

    # Video, exact rounding.

    def video_rates(self, layout: TokenLayout) -> Tensor:
        """Removed share of the video that is asked for, and the bounds of a frame's, [3, B, 1] float64.

        The bounds give way where the asked rate comes closer to them than `headroom`.
        """
        s = self.settings
        asked = 1 - self.asked(layout).video / np.maximum(layout.counts(Modality.VIDEO), 1)
        low, high = np.clip(asked - s.headroom, 0, s.rho_min), np.clip(asked + s.headroom, s.rho_max, 1)
        return torch.from_numpy(np.stack([asked, low, high])[..., None]).to(layout.device, non_blocking=True)

    def counts_by_rate(self, removed: Tensor, frames: Segments, layout: TokenLayout) -> Tensor:
        """Kept tokens per frame that meet the video budget.

        Args:
            removed: [B, F] float64, the share of each frame that a method would remove.
            frames: [B, F, P].
            layout: of the batch.

        Returns:
            [B, F] long.
        """
        _, low, high = self.video_rates(layout)
        size, total = (
            torch.from_numpy(n).to(removed.device, non_blocking=True) for n in (frames.sizes, self.asked(layout).video)
        )
        share = water_fill(size.double(), 1 - removed, 1 - high, 1 - low, total.double())
        return round_to_total(share * size, size, total)
