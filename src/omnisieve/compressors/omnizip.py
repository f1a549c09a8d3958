"""OmniZip: audio attention decides which audio stays and how much video each window may keep (arXiv 2511.14582).

1. Audio: the most attended tokens stay, and anchors that take up others (see `anchors`).
2. Budgets: a window that keeps more of its audio keeps more of its video.
3. Video: even frames of a window keep density peaks, odd frames keep what differs from the frame before.

`rounding="official"` reproduces the published functions: anchors come on top of the audio budget, windows' rates are
scaled between two frozen extremes and clamped (so the video budget is met only by chance), frames round down.
They are those of the published code where 2 s of a sequence are one run of two grids and one of audio: Qwen2.5-Omni
below the frame cap. Published windows are runs and published frames are compared within a run; ours last 2 s by time
under either rounding, also where grids are spread out and in Qwen3-Omni, whose runs are one grid. `units` counts frames
and audio tokens instead, and under official rounding does so everywhere.

`rounding="exact"`, the default, differs in this:

- anchors count as kept audio;
- window rates are shifted together until the total is exact, and frames are rounded by largest remainder. The clamps
  rho_min and rho_max give way where the asked rate comes closer to them than `headroom`;
- a token to be merged is compared with the video of its own window, and attention is ranked relative to its window.

`variant="paper"` follows the text where the published functions do not: densities from squared Euclidean distances
(equations 7 and 8), attention over the whole file (equation 2), merged tokens compared with the video of their own
window. The text does not say how rates are normalised; that is as in the other variants, and so is a frame: a grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from omnisieve.compressors.anchors import AnchoredAudio, AnchorSettings, Scope
from omnisieve.compressors.base import CompressorError, Needs, drop_share, register
from omnisieve.compressors.omnizip_published import Cuts, frozen_extremes, half_grid_cuts
from omnisieve.compressors.ranked import Ranked
from omnisieve.compressors.saliency import alternating_saliency
from omnisieve.layout import Modality, TokenLayout
from omnisieve.ops.budget import floor_product
from omnisieve.ops.clustering import Metric, density_peaks, distance_scale, isolation
from omnisieve.plan import Plan

VARIANTS = ("core", "paper", "units")


@dataclass(frozen=True, kw_only=True)
class OmniZipSettings(AnchorSettings):
    """Settings of OmniZip; further ones in `AnchorSettings`.

    Attributes:
        variant: "core" (current published version: a frame is a grid, density peaks), "paper" (as the text has it) or
            "units" (first release: a frame is half a grid under official rounding, isolated tokens).
    """

    variant: Literal["core", "paper", "units"] = "core"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise CompressorError(f"omnizip: variant is {self.variant!r}; choose one of {', '.join(VARIANTS)}")


@register("omnizip")
class OmniZip(AnchoredAudio):
    """See the module's docstring; settings in `OmniZipSettings`."""

    settings: OmniZipSettings
    settings_type = OmniZipSettings

    @property
    def scope(self) -> Scope:
        """See `AnchorSettings`; the paper's is the file."""
        return self.settings.scope or ("file" if self.settings.variant == "paper" else super().scope)

    @property
    def merge_scope(self) -> Scope:
        """See `AnchorSettings`; the paper's is the window."""
        return self.settings.merge_scope or ("window" if self.settings.variant == "paper" else super().merge_scope)

    @property
    def keeps_bare_anchors(self) -> bool:
        """The first release keeps them."""
        return self.settings.variant == "units"

    def plan(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> Plan:
        """Select audio, derive window budgets from it, then select video. See `Compressor.plan`."""
        attention = self.attention(needs, layout)
        audio = self.choose_audio(attention, layout)
        video = self._rank_video(embeds, audio.mask, layout)
        merge = self.merge_audio(audio, embeds, layout)
        return self.make_plan(layout, video.keep() | audio.mask, scores=attention, merge=merge)

    def rank(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> tuple[Ranked, Ranked]:
        """Counts of the video are those that this method's own audio gives it. See `Compressor.rank`."""
        attention = self.attention(needs, layout)
        audio = self.choose_audio(attention, layout)
        return self._rank_video(embeds, audio.mask, layout), self.rank_audio(audio, attention, layout)

    def official_counts(self, modality: Modality, layout: TokenLayout, sizes: np.ndarray) -> np.ndarray:
        """Audio with its anchors; of video the most that the clamps let through (units leaves tails whole)."""
        if modality == Modality.AUDIO or self.settings.variant == "units":
            return super().official_counts(modality, layout, sizes)
        return floor_product(sizes, 1.0 - min(self.settings.rho_min, drop_share(self.ratio_of(modality))))

    def _video_counts(self, keep_audio: Tensor, cuts: Cuts, layout: TokenLayout) -> Tensor:
        """Kept tokens per frame, [B, F], from the share of audio that each window keeps."""
        audio_size = torch.from_numpy(cuts.audio.sizes).to(keep_audio.device, non_blocking=True)
        kept = (cuts.audio.gather(keep_audio) & cuts.audio.valid).sum(dim=-1)
        # Retention in single precision, as published.
        retention = (kept.float() / audio_size.clamp(min=1)).double()
        if self.official:
            s = self.settings
            frame_size = torch.from_numpy(cuts.frames.sizes).to(keep_audio.device, non_blocking=True)
            rate = (s.rho_max + (s.rho_min - s.rho_max) * retention).clamp(s.rho_min, s.rho_max)
            removed = frozen_extremes(rate, drop_share(self.ratio_of(Modality.VIDEO)), s.rho_min, s.rho_max, cuts)
            return (frame_size * (1.0 - cuts.per_frame(removed))).floor().long()
        asked, low, high = self.video_rates(layout)
        removed = torch.where(audio_size > 0, high + (low - high) * retention, asked)
        return self.counts_by_rate(cuts.per_frame(removed), cuts.frames, layout)

    def _rank_video(self, embeds: Tensor, keep_audio: Tensor, layout: TokenLayout) -> Ranked:
        """Video tokens by frame."""
        s = self.settings
        cuts = half_grid_cuts(layout) if self.official and s.variant == "units" else Cuts.of(layout)
        counts, frames = self._video_counts(keep_audio, cuts, layout), cuts.frames
        tokens = frames.gather(embeds)
        metric: Metric = "euclidean" if s.variant == "paper" else "cosine"
        if s.variant == "units":
            spatial = isolation(tokens, frames.valid, s.neighbours)
        else:
            spatial = density_peaks(tokens, frames.valid, s.neighbours, metric)
        odd = cuts.odd_frames()
        scores = alternating_saliency(tokens, spatial, odd)
        scale = torch.where(odd, 1.0, distance_scale(tokens, frames.valid, metric))
        return Ranked(frames, counts, frames.scatter(scores, 0.0), scale)
