"""OmniSIFT: a spatio-temporal video pruner, then a vision-guided audio selector (arXiv 2602.04804).

Video first: of every frame the most telling tokens are kept. Then, window by window, audio tokens attend to the
video tokens that were kept, and the best-scored audio tokens stay.

Two video pruners ship. `similarity` is the published one and has no parameters: dissimilarity to the frame mean, and
to the co-located token of the frame before. `learned` is trained through the estimator: a small CNN over each
frame's grid of visual projections, fused with a temporal score.

With a `base` it starts as a training-free method instead (`compressors.learned`): the learned pruner and the selector
then give the differences to the base's order. The similarity pruner stays what it is, and only audio has the base.

Where the published code differs from the paper: the residual of the selector lives in the projected, normalised
space (code); counts are n - floor(n * dropped) (code; `rounding="official"`); chunks are pairs of consecutive grids
(code; `chunks="pair_grids"`), which are the paper's 2-s windows unless a frame cap spreads the grids out. Official
rounding keeps audio whole that sounds before the first pair. Where we differ from both: a pair never joins two videos;
all windows of all samples are scored in one call; audio without video works.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from omnisieve.compressors.base import CompressorError, Needs, register
from omnisieve.compressors.learned import LearnedCompressor, LearnedSettings, begin_at_zero
from omnisieve.compressors.ranked import Ranked
from omnisieve.compressors.saliency import previous_frame_change, spatiotemporal_saliency
from omnisieve.layout import Modality, SegmentKind, Segments, TokenLayout
from omnisieve.ops.estimators import straight_through
from omnisieve.ops.similarity import segment_mean
from omnisieve.plan import Plan


@dataclass(frozen=True, kw_only=True)
class OmniSiftSettings(LearnedSettings):
    """Settings of OmniSIFT; the base it may start from is in `LearnedSettings`.

    Attributes:
        video_pruner: "learned", or "similarity" (published, no parameters).
        audio_selector: "vision_guided" (published).
        chunks: within what audio attends to video, and a frame is compared with the one before: "windows" of 2 s, or
            "pair_grids", two consecutive grids of a video, as the published code cuts (imported weights have it).
        width: hidden width of the selector (512 in the paper); also of what the learned pruner sees.
        heads: attention heads of the selector (8).
        pruner_channels: channels of the learned pruner's CNN.
        temporal_span: which earlier frame the learned pruner compares with: in the same "window", or the same
            video ("item").
        score_norm: "window" standardises scores per window (with a base: per segment of the base) before the sigmoid,
            which keeps its gradient alive; "none" is published. The selection is the same.
    """

    video_pruner: Literal["learned", "similarity"] = "learned"
    audio_selector: Literal["vision_guided"] = "vision_guided"
    chunks: Literal["windows", "pair_grids"] = "windows"
    width: int = 512
    heads: int = 8
    pruner_channels: int = 64
    temporal_span: Literal["window", "item"] = "window"
    score_norm: Literal["window", "none"] = "window"

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "video_pruner": ("learned", "similarity"),
            "audio_selector": ("vision_guided",),
            "chunks": ("windows", "pair_grids"),
            "temporal_span": ("window", "item"),
            "score_norm": ("window", "none"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise CompressorError(f"omnisift: {name} is {getattr(self, name)!r}; choose one of {allowed}")
        if self.width % self.heads:
            raise CompressorError(f"omnisift: width {self.width} is not a multiple of heads {self.heads}")


class VisionGuidedSelector(nn.Module):
    """Scores audio tokens by attending to the kept video tokens of their window (paper section 3.3).

    Parameter names are those of the published checkpoint.
    """

    def __init__(self, hidden_size: int, width: int, heads: int) -> None:
        super().__init__()
        self.v_proj = nn.Linear(hidden_size, width)
        self.a_proj = nn.Linear(hidden_size, width)
        self.v_norm = nn.LayerNorm(width)
        self.a_norm = nn.LayerNorm(width)
        self.post_attn_norm = nn.LayerNorm(width)
        self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.score_head = nn.Sequential(nn.Linear(width, width // 2), nn.SiLU(), nn.Linear(width // 2, 1))

    def project_video(self, video: Tensor) -> Tensor:
        """Visual projection, [..., D] -> [..., width]; shared with the learned pruner."""
        return self.v_norm(self.v_proj(video))

    def forward(self, audio: Tensor, context: Tensor, visible: Tensor) -> Tensor:
        """Score audio tokens.

        Args:
            audio: [N, A, D] audio tokens of N windows.
            context: [N, V, width] projected video tokens.
            visible: [N, V] bool, at least one True per window.

        Returns:
            logits [N, A], before the sigmoid.
        """
        query = self.a_norm(self.a_proj(audio))
        attended, _ = self.cross_attn(query, context, context, key_padding_mask=~visible, need_weights=False)
        return self.score_head(self.post_attn_norm(attended + query)).squeeze(-1)


class LearnedVideoPruner(nn.Module):
    """Saliency of video tokens: a depthwise-separable CNN within a frame, change against the frame before.

    z = alpha * cnn(frame) + beta * (w1 * d + w2 * mean(d) + b), with d the dissimilarity to the co-located earlier
    token; the frame-level mean lets near-duplicate frames sink as a whole.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.Conv2d(width, channels, 1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.GELU(),
            nn.Conv2d(channels, 1, 1),
        )
        self.temporal = nn.Linear(2, 1)
        self.fusion = nn.Parameter(torch.ones(2))
        nn.init.constant_(self.temporal.weight, 0.5)
        nn.init.zeros_(self.temporal.bias)

    def begin_at_zero(self) -> None:
        """Make both scores zero, until they are trained."""
        begin_at_zero(self.cnn[-1])
        begin_at_zero(self.temporal)

    def forward(self, projected: Tensor, change: Tensor, has_previous: Tensor, layout: TokenLayout) -> Tensor:
        """Logits of video tokens.

        Args:
            projected: [B, S, width] visual projections.
            change: [B, S] dissimilarity to the co-located earlier token.
            has_previous: [B, S] bool, whether there is one.
            layout: of the batch.

        Returns:
            [B, S]; 0 outside video.
        """
        canvas, height, width = layout.canvas()
        batch, frames, cells = canvas.index.shape
        inside = canvas.valid.reshape(batch * frames, 1, height, width)
        image = canvas.gather(projected).reshape(batch * frames, height, width, -1).permute(0, 3, 1, 2)
        # Cells off a frame's own grid are zero before each 3x3 convolution, as the border of a larger grid is not:
        # a frame is scored alike whatever else the batch holds.
        near = self.cnn[:3](image * inside)
        spatial = self.cnn[3:](near * inside).reshape(batch, frames, cells)
        change = canvas.gather(change)
        frame_change = segment_mean(change.unsqueeze(-1), canvas.valid).expand_as(change)
        pair = torch.stack([change, frame_change], dim=-1).to(projected.dtype)
        temporal = self.temporal(pair).squeeze(-1)
        temporal = temporal.masked_fill(~canvas.gather(has_previous), 0)
        return canvas.scatter(self.fusion[0] * spatial + self.fusion[1] * temporal, 0.0)


@register("omnisift")
class OmniSift(LearnedCompressor):
    """See the module's docstring; settings in `OmniSiftSettings`."""

    settings: OmniSiftSettings
    settings_type = OmniSiftSettings
    segment_kinds: ClassVar[Mapping[Modality, SegmentKind]] = {Modality.VIDEO: "frame", Modality.AUDIO: "window"}

    def __init__(self, settings: OmniSiftSettings, hidden_size: int) -> None:
        super().__init__(settings)
        self.hidden_size = hidden_size
        self.selector = VisionGuidedSelector(hidden_size, settings.width, settings.heads)
        learned = settings.video_pruner == "learned"
        self.pruner = LearnedVideoPruner(settings.width, settings.pruner_channels) if learned else None
        if settings.base is not None:
            begin_at_zero(self.selector.score_head[-1])
            if self.pruner is not None:
                self.pruner.begin_at_zero()

    def segments_of(self, modality: Modality, layout: TokenLayout) -> Segments:
        """Frames of video, and chunks of audio."""
        return super().segments_of(modality, self._chunked(layout))

    def official_counts(self, modality: Modality, layout: TokenLayout, sizes: np.ndarray) -> np.ndarray:
        """n - int(n * (1 - ratio)); audio that no pair of grids holds stays."""
        counts = super().official_counts(modality, layout, sizes)
        if modality == Modality.VIDEO or self.settings.chunks == "windows":
            return counts
        return np.where(self._chunked(layout).segments("window", Modality.VIDEO).sizes > 0, counts, sizes)

    def plan(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> Plan:
        """Prune video, then select audio by what is left of the video. See `Compressor.plan`."""
        video, audio = self.rank(embeds, layout, needs)
        keep = video.keep() | audio.keep()
        scored = [Modality.AUDIO] if self.pruner is None else [Modality.VIDEO, Modality.AUDIO]
        video_scores = video.scores if self.pruner is None else self._squash(video, Modality.VIDEO, layout)
        scores = torch.where(layout.mask(Modality.VIDEO), video_scores, self._squash(audio, Modality.AUDIO, layout))
        gate = None
        if torch.is_grad_enabled() and scores.requires_grad:
            gate = torch.where(layout.mask(*scored), straight_through(keep, scores), 1.0)
        return self.make_plan(layout, keep, scores=scores.detach(), gate=gate)

    def rank(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> tuple[Ranked, Ranked]:
        """By logits, through which gradients flow. See `Compressor.rank`."""
        base_video, base_audio = self.base_order(embeds, layout, needs)
        chunked = self._chunked(layout)
        # A weight that is read by name would be fetched from all ranks under ZeRO-3.
        embeds = embeds.to(next(self.selector.parameters()).dtype)
        projected = self.selector.project_video(embeds)
        if self.pruner is None:
            video = self.ranked(Modality.VIDEO, spatiotemporal_saliency(embeds, chunked), layout, 1.0)
        else:
            change, has_previous = previous_frame_change(embeds, chunked, self.settings.temporal_span)
            logits = self.pruner(projected, change, has_previous, layout)
            video = self.refined(Modality.VIDEO, logits, layout, base_video)
        logits = self._audio_logits(embeds, projected, video.keep(), chunked)
        return video, self.refined(Modality.AUDIO, logits, layout, base_audio)

    def _audio_logits(self, embeds: Tensor, projected: Tensor, keep_video: Tensor, layout: TokenLayout) -> Tensor:
        """[B, S]; all windows of all samples, as the layout cuts them, in one call of the selector."""
        video, audio = (layout.segments("window", m) for m in (Modality.VIDEO, Modality.AUDIO))
        batch, windows, _ = audio.index.shape
        visible = video.gather(keep_video) & video.valid
        # A window without kept video attends to the projection of the sample's mean video token (zeros without video).
        all_video = layout.segments("all", Modality.VIDEO)
        mean = segment_mean(all_video.gather(embeds), all_video.valid).to(embeds.dtype)
        stand_in = self.selector.project_video(mean).unsqueeze(1).expand(-1, windows, -1, -1)
        context = torch.cat([video.gather(projected), stand_in], dim=2)
        visible = torch.cat([visible, ~visible.any(dim=-1, keepdim=True)], dim=2)
        logits = self.selector(audio.gather(embeds).flatten(0, 1), context.flatten(0, 1), visible.flatten(0, 1))
        return audio.scatter(logits.reshape(batch, windows, -1), 0.0)

    def _chunked(self, layout: TokenLayout) -> TokenLayout:
        """The layout whose windows are chunks."""
        return layout if self.settings.chunks == "windows" else layout.by_grid_pairs()

    def _squash(self, ranked: Ranked, modality: Modality, layout: TokenLayout) -> Tensor:
        """Scores in (0, 1), [B, S], from logits."""
        if self.settings.score_norm == "none":
            return ranked.scores.sigmoid()
        windows = self._chunked(layout).segments("window", modality)
        segments = windows if self.settings.base is None else ranked.segments
        grouped = segments.gather(ranked.scores)
        mean = segment_mean(grouped.unsqueeze(-1), segments.valid)
        centred = grouped - mean
        variance = segment_mean(centred.square().unsqueeze(-1), segments.valid)
        return segments.scatter(centred * (variance + 1e-6).rsqrt(), 0.0).sigmoid()
