"""DASH: audio is cut where it changes; video is pruned by how much of its segment's audio stays (arXiv 2603.15685).

1. Segments: audio is cut where neighbouring tokens differ, no piece shorter than `min_segment`.
2. Audio: tokens stay that begin something, are unlike the rest and receive attention; anchors take up others (see
   `anchors`).
3. Video: a segment that keeps more of its audio keeps more of its video. Even frames of a segment keep tokens that
   stand alone, odd frames what differs from the frame before.

`rounding="official"` reproduces the published functions: segments end at shares of the video's tokens, a frame is
half a grid counted from there, what does not fill a frame is dropped, and nothing makes the rates meet the budget.
Tokens are counted and no window is cut, so that it means the same at every frame rate and in every model.
`rounding="exact"`, the default, differs in this:

- a frame is a grid and belongs to the segment that sounds in its middle, on the same clock; without sound to the
  whole item, which is removed at the asked rate;
- all rates are shifted together until the total is exact; anchors count as kept audio;
- every audio item is cut for itself, a token to be merged is compared with the video of its own window, and attention
  is ranked relative to its window.

The paper's text was not at hand, only its abstract: steps and constants are those of the published code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omnisieve.compressors.anchors import AnchoredAudio, AnchorSettings
from omnisieve.compressors.base import CompressorError, Needs, drop_share, register
from omnisieve.compressors.dash_segments import AudioCuts, half_grids, segments_of_frames
from omnisieve.compressors.ranked import Ranked
from omnisieve.compressors.saliency import alternating_saliency
from omnisieve.layout import Modality, Segments, TokenLayout
from omnisieve.ops.clustering import isolation, uniqueness
from omnisieve.plan import Plan

EPS = 1e-6
SILENT_RELIEF, SILENT_LEAST = 0.15, 0.35
"""Published rate of a silent video: what is taken off the asked rate, and its least."""


@dataclass(frozen=True, kw_only=True)
class DashSettings(AnchorSettings):
    """Settings of DASH; further ones in `AnchorSettings`.

    Attributes:
        threshold: cosine of neighbouring audio tokens below which a segment may begin (0.4).
        min_segment: audio tokens between two cuts, at least (30).
        guidance: how much the removed share of a segment's video falls from no to all of its audio kept (0.1).
        boundary_bonus: share of what the first frame of a segment would lose that it keeps at a certain boundary
            (exact rounding only; the published code computes it, with 0.3, and does not use it).
    """

    rho_min: float = 0.1
    rho_max: float = 0.95
    headroom: float = 0.05
    threshold: float = 0.4
    min_segment: int = 30
    guidance: float = 0.1
    boundary_bonus: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (("threshold", -1, 1), ("guidance", 0, 1), ("boundary_bonus", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise CompressorError(f"dash: {name} is {getattr(self, name)}; it must lie in [{low}, {high}]")
        if self.min_segment < 1:
            raise CompressorError(f"dash: min_segment is {self.min_segment}; a segment has at least one token")
        if self.boundary_bonus and self.rounding == "official":
            raise CompressorError("dash: boundary_bonus is not in the published function; set it to 0")


@register("dash")
class Dash(AnchoredAudio):
    """See the module's docstring; settings in `DashSettings`."""

    settings: DashSettings
    settings_type = DashSettings

    @property
    def keeps_bare_anchors(self) -> bool:
        """As published."""
        return self.official

    def plan(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> Plan:
        """Cut and select audio, then select video by its segments. See `Compressor.plan`."""
        cuts = self.audio_cuts(embeds, layout)
        scores = self._audio_scores(embeds, self.attention(needs, layout), cuts, layout)
        audio = self.choose_audio(scores, layout, 1.0)
        retention = cuts.retention(audio.mask)
        if self.official:
            keep_video = self._published_video(embeds, cuts, retention, layout)
        else:
            keep_video = self._rank_video(embeds, cuts, retention, layout).keep()
        merge = self.merge_audio(audio, embeds, layout)
        return self.make_plan(layout, keep_video | audio.mask, scores=scores, merge=merge)

    def rank(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> tuple[Ranked, Ranked]:
        """Counts of the video are those that this method's own audio gives it. See `Compressor.rank`."""
        if self.official:
            raise CompressorError("dash: published frames do not hold every token, so they give no order of all")
        cuts = self.audio_cuts(embeds, layout)
        scores = self._audio_scores(embeds, self.attention(needs, layout), cuts, layout)
        audio = self.choose_audio(scores, layout, 1.0)
        video = self._rank_video(embeds, cuts, cuts.retention(audio.mask), layout)
        return video, self.rank_audio(audio, scores, layout, 1.0)

    def audio_cuts(self, embeds: Tensor, layout: TokenLayout) -> AudioCuts:
        """Cuts of the audio, from embeddings [B, S, D]."""
        # All audio of an item is one frame.
        audio = layout.segments("all" if self.official else "frame", Modality.AUDIO)
        return AudioCuts.of(embeds, audio, self.settings.threshold, self.settings.min_segment)

    def _audio_scores(self, embeds: Tensor, attention: Tensor, cuts: AudioCuts, layout: TokenLayout) -> Tensor:
        """What audio is worth, [B, S]; 0 outside audio."""
        whole = layout.segments("all", Modality.AUDIO)
        unlike = whole.scatter(uniqueness(whole.gather(embeds), whole.valid), 0.0)
        boundary = cuts.audio.scatter(cuts.boundary, 0.0)
        boundary, attention = (x / (x.amax(dim=1, keepdim=True) + EPS) for x in (boundary, attention))
        return 0.4 * boundary + 0.3 * unlike + 0.3 * attention

    def _rank_video(self, embeds: Tensor, cuts: AudioCuts, retention: Tensor, layout: TokenLayout) -> Ranked:
        """Video tokens by frame; frames share the budget by the segments they belong to."""
        s, frames = self.settings, layout.segments("frame", Modality.VIDEO)
        segment, first, odd = segments_of_frames(cuts, layout)
        retention, boundary = (
            torch.where(segment >= 0, values.gather(1, segment.clamp(min=0)), unknown)
            for values, unknown in ((retention, 0.5), (cuts.total(cuts.boundary * cuts.starts), 0.0))
        )
        removed = self.video_rates(layout)[0] + s.guidance * (0.5 - retention)
        removed = removed * (1 - s.boundary_bonus * boundary * first)
        return self._rank_frames(embeds, frames, odd, self.counts_by_rate(removed, frames, layout))

    def _published_video(self, embeds: Tensor, cuts: AudioCuts, retention: Tensor, layout: TokenLayout) -> Tensor:
        """Kept video tokens [B, S] as published."""
        s, asked = self.settings, drop_share(self.ratio_of(Modality.VIDEO))
        grids = half_grids(cuts.starts[:, 0], layout)
        rate = (asked + s.guidance * (0.5 - retention.gather(1, grids.segment))).clamp(s.rho_min, s.rho_max)
        silent = torch.from_numpy(layout.counts(Modality.AUDIO) == 0).to(rate.device, non_blocking=True)
        rate = torch.where(silent.unsqueeze(-1), max(SILENT_LEAST, asked - SILENT_RELIEF), rate)
        size = torch.from_numpy(grids.frames.sizes).to(rate.device, non_blocking=True)
        counts = (size * (1 - rate)).floor().long()
        return self._rank_frames(embeds, grids.frames, grids.odd, counts).keep() | grids.whole

    def _rank_frames(self, embeds: Tensor, frames: Segments, odd: Tensor, counts: Tensor) -> Ranked:
        """Tokens that stand alone first in even frames, those that differ from the frame before in odd ones."""
        tokens = frames.gather(embeds)
        spatial = isolation(tokens, frames.valid, self.settings.neighbours)
        scores = alternating_saliency(tokens, spatial, odd.unsqueeze(-1))
        return Ranked(frames, counts, frames.scatter(scores, 0.0), 1.0)
