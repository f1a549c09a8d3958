"""OmniZip: audio attention decides which audio stays and how much video each window may keep (arXiv 2511.14582).

1. Audio: the most attended tokens stay. Of the rest, evenly spaced anchors stay as well; each takes up the few tokens
   nearest to it that resemble the video most.
2. Budgets: a window that keeps more of its audio keeps more of its video.
3. Video: even frames of a window keep density peaks, odd frames keep what differs from the frame before.

`rounding="official"` reproduces the published functions: anchors come on top of the audio budget, windows' rates are
scaled between two frozen extremes and clamped (so the video budget is met only by chance), frames round down.
`rounding="exact"`, the default, differs in this:

- anchors count as kept audio;
- window rates are shifted together until the total is exact (water-filling), and frames are rounded by largest
  remainder. The clamps rho_min and rho_max give way where the asked rate comes closer to them than `headroom`;
- a token to be merged is compared with the video of its own window, and attention is ranked relative to its window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from omnisieve.compressors.base import Budget, Compressor, CompressorError, Need, Needs, Settings, drop_share, register
from omnisieve.compressors.omnizip_published import Cuts, frozen_extremes, half_grid_cuts
from omnisieve.compressors.saliency import relative_to_window
from omnisieve.layout import Modality, SegmentKind, TokenLayout
from omnisieve.ops.budget import floor_product
from omnisieve.ops.clustering import density_peaks, isolation
from omnisieve.ops.merge import merge_into_anchors, spaced_anchors
from omnisieve.ops.similarity import cosine, unit
from omnisieve.ops.topk import topk_mask
from omnisieve.ops.waterfill import round_to_total, water_fill
from omnisieve.plan import Merge, Plan


@dataclass(frozen=True, kw_only=True)
class OmniZipSettings(Settings):
    """Settings of OmniZip.

    Attributes:
        variant: "core" (current published version: a frame is a grid, density peaks) or "units" (first release: a
            frame is half a grid under official rounding, isolated tokens).
        scope: what audio attention and the similarity of merged tokens range over: "window" or "file" (published).
            None: "file" under official rounding, else "window".
        contextual_ratio: share of audio tokens that become anchors.
        merge_group: tokens merged into an anchor, at most (3; 15 for AVUT); 0: no anchors.
        neighbours: of the density (5).
        rho_min, rho_max: bounds of the removed share of a window (0.35, 0.75).
        headroom: how far the bounds stay away from the asked removed share, at least (exact rounding only).
    """

    variant: Literal["core", "units"] = "core"
    scope: Literal["window", "file"] | None = None
    contextual_ratio: float = 0.05
    merge_group: int = 3
    neighbours: int = 5
    rho_min: float = 0.35
    rho_max: float = 0.75
    headroom: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("variant", ("core", "units")), ("scope", (None, "window", "file"))):
            if getattr(self, name) not in allowed:
                raise CompressorError(f"omnizip: {name} is {getattr(self, name)!r}; choose one of {allowed}")
        if not 0 <= self.rho_min <= self.rho_max <= 1:
            raise CompressorError(f"omnizip: need 0 <= rho_min <= rho_max <= 1, got {self.rho_min}, {self.rho_max}")
        for name, least in (("contextual_ratio", 0), ("merge_group", 0), ("neighbours", 1), ("headroom", 0)):
            if getattr(self, name) < least:
                raise CompressorError(f"omnizip: {name} is {getattr(self, name)}; it must be at least {least}")


@register("omnizip")
class OmniZip(Compressor):
    """See the module's docstring; settings in `OmniZipSettings`."""

    settings: OmniZipSettings
    settings_type = OmniZipSettings
    segment_kinds: ClassVar[Mapping[Modality, SegmentKind]] = {Modality.VIDEO: "frame", Modality.AUDIO: "all"}

    @property
    def official(self) -> bool:
        """Whether the published functions are reproduced."""
        return self.settings.rounding == "official"

    @property
    def scope(self) -> Literal["window", "file"]:
        """See `OmniZipSettings`."""
        return self.settings.scope or ("file" if self.official else "window")

    @property
    def needs(self) -> tuple[Need, ...]:
        """Attention that audio tokens receive in the encoder."""
        return (Need("attention_received", Modality.AUDIO, "global" if self.scope == "file" else "encoder"),)

    def plan(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> Plan:
        """Select audio, derive window budgets from it, then select video. See `Compressor.plan`."""
        attention = self.statistic(needs, self.needs[0])
        if self.scope == "window":
            attention = relative_to_window(attention, layout)
        keep_audio, merge = self._audio(embeds, attention, layout)
        cuts = half_grid_cuts(layout) if self.official and self.settings.variant == "units" else Cuts.of(layout)
        keep_video = self._video(embeds, self._video_counts(keep_audio, cuts, layout), cuts)
        return self.make_plan(layout, keep_video | keep_audio, scores=attention, merge=merge)

    def budget(self, layout: TokenLayout) -> Budget:
        """Kept tokens; under official rounding the video count depends on the content, this is its upper bound."""
        return replace(super().budget(layout), exact=not self.official)

    def official_counts(self, modality: Modality, layout: TokenLayout, sizes: np.ndarray) -> np.ndarray:
        """Audio with its anchors; of video the most that the clamps let through (units leaves tails whole)."""
        if modality == Modality.AUDIO:
            dominant, anchors = self._audio_counts(layout)
            return (dominant + anchors)[:, None]
        if self.settings.variant == "units":
            return sizes
        return floor_product(sizes, 1.0 - min(self.settings.rho_min, drop_share(self.ratio_of(modality))))

    def _audio_counts(self, layout: TokenLayout) -> tuple[np.ndarray, np.ndarray]:
        """Most attended tokens and anchors per sample, [B] each."""
        s, size = self.settings, layout.counts(Modality.AUDIO)
        anchors = np.rint(s.contextual_ratio * size).astype(np.int64) * (s.merge_group > 0 or s.variant == "units")
        if self.official:
            # As published, binary fractions included.
            dominant = np.rint((1.0 - drop_share(self.ratio_of(Modality.AUDIO))) * size).astype(np.int64)
            return dominant, np.minimum(anchors, size - dominant)
        total = self.asked(layout).audio
        # Anchors never take more than half of what is kept.
        anchors = np.minimum(np.minimum(anchors, size - total), total // 2)
        return total - anchors, anchors

    def _audio(self, embeds: Tensor, attention: Tensor, layout: TokenLayout) -> tuple[Tensor, Merge | None]:
        """Kept audio tokens [B, S] and what is merged into the anchors."""
        dominant_count, anchor_count = self._audio_counts(layout)
        whole = layout.segments("all", Modality.AUDIO)
        counts = torch.from_numpy(dominant_count[:, None]).to(embeds.device, non_blocking=True)
        dominant = whole.scatter(topk_mask(whole.gather(attention), whole.valid, counts), False)
        if not anchor_count.any():
            return dominant, None
        rest = layout.mask(Modality.AUDIO) & ~dominant
        anchors = spaced_anchors(rest, layout.counts(Modality.AUDIO) - dominant_count, anchor_count)
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
        return dominant | anchors, Merge(source, target, weight, whole.scatter(own.unsqueeze(1), 1.0))

    def _likeness(self, embeds: Tensor, layout: TokenLayout) -> Tensor:
        """Largest cosine of each audio token to the video in scope, [B, S]; -inf where there is no video."""
        kind: SegmentKind = "window" if self.scope == "window" else "all"
        audio, video = (layout.segments(kind, m) for m in (Modality.AUDIO, Modality.VIDEO))
        cosines = unit(audio.gather(embeds)) @ unit(video.gather(embeds)).transpose(-1, -2)
        return audio.scatter(cosines.masked_fill(~video.valid.unsqueeze(-2), -torch.inf).amax(dim=-1), -torch.inf)

    def _video_counts(self, keep_audio: Tensor, cuts: Cuts, layout: TokenLayout) -> Tensor:
        """Kept tokens per frame, [B, F], from the share of audio that each window keeps."""
        audio_size, video_size = (torch.from_numpy(c.sizes).to(keep_audio.device) for c in (cuts.audio, cuts.video))
        kept = (cuts.audio.gather(keep_audio) & cuts.audio.valid).sum(dim=-1)
        # Retention in single precision, as published.
        retention = (kept.float() / audio_size.clamp(min=1)).double()
        frame_size = torch.from_numpy(cuts.frames.sizes).to(keep_audio.device)
        if self.official:
            s = self.settings
            asked = drop_share(self.ratio_of(Modality.VIDEO))
            rate = (s.rho_max + (s.rho_min - s.rho_max) * retention).clamp(s.rho_min, s.rho_max)
            removed = frozen_extremes(rate, asked, s.rho_min, s.rho_max, cuts)
            return (frame_size * (1.0 - cuts.per_frame(removed))).floor().long()
        target = self.asked(layout).video
        share = self._exact_share(retention, audio_size > 0, video_size, target)
        total = torch.from_numpy(target).to(share.device, non_blocking=True)
        return round_to_total(cuts.per_frame(share) * frame_size, frame_size, total)

    def _exact_share(self, retention: Tensor, guided: Tensor, size: Tensor, target: np.ndarray) -> Tensor:
        """Kept share of every window's video, [B, W], that sums to `target` [B] tokens."""
        s, whole = self.settings, size.sum(dim=-1)
        kept = torch.from_numpy(target).to(size.device, non_blocking=True).double()
        asked = 1 - kept / whole.clamp(min=1)
        low = (asked - s.headroom).clamp(0, s.rho_min).unsqueeze(-1)
        high = (asked + s.headroom).clamp(s.rho_max, 1).unsqueeze(-1)
        removed = torch.where(guided, high + (low - high) * retention, asked.unsqueeze(-1))
        return water_fill(size.double(), 1 - removed, 1 - high.squeeze(-1), 1 - low.squeeze(-1), kept)

    def _video(self, embeds: Tensor, counts: Tensor, cuts: Cuts) -> Tensor:
        """Kept video tokens, [B, S]."""
        frames = cuts.frames
        tokens = frames.gather(embeds)
        spatial = density_peaks if self.settings.variant == "core" else isolation
        change = 1 - cosine(tokens, tokens.roll(1, dims=1))
        scores = torch.where(cuts.odd_frames(), change, spatial(tokens, frames.valid, self.settings.neighbours))
        return frames.scatter(topk_mask(scores, frames.valid, counts), False)
