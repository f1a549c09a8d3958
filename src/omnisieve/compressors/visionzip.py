"""VisionZip: the most attended tokens stay, and a few contextual ones that sum up the rest (arXiv 2412.04467).

In every frame of video and every 2 s of audio the tokens that receive most attention in the encoder stay (dominant).
Of the rest evenly spaced anchors stay as well, one token in twenty; every other token joins the anchor with the most
similar encoder key, and the mean of those that joined is added to the anchor's embedding (not averaged with it: the
published rule, which doubles its norm). The published code keeps CLIP's CLS token and puts contextual tokens last;
here, as in the omni-modal adaptation that SEATS describes, there is no CLS token and tokens keep their order.

`visionzip_om` prunes both modalities. `visionzip` leaves audio whole and solves the share of the video per sample; if
that would fall below `video_floor`, the video stays there and audio is dropped at random for the rest.

`rounding="official"` rounds as SEATS' code does, always down, and cuts audio into 50 tokens each: 2 s of Qwen2.5-Omni,
near 4 s of Qwen3-Omni. The total is truncated
before the share of the video is solved from it, and a video at its floor keeps contextual tokens only.
`rounding="exact"` meets the total by largest remainder; anchors are part of it, and never more than there are tokens to
join them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from omnisieve.compressors.base import Budget, Compressor, CompressorError, Need, Needs, Settings, Span, register
from omnisieve.compressors.random import random_scores
from omnisieve.compressors.ranked import Ranked
from omnisieve.compressors.ratios import PUBLISHED_VIDEO_FLOOR, asked_budget, intact_shares
from omnisieve.layout import MEDIA, Modality, SegmentKind, Segments, TokenLayout
from omnisieve.ops.budget import round_count, round_product
from omnisieve.ops.merge import spaced_anchors, spread_over_anchors
from omnisieve.ops.topk import tiered, topk_mask
from omnisieve.plan import Merge, Plan

PUBLISHED_AUDIO_CUT = 50
"""Audio tokens in a window of the published code, 2 s of Qwen2.5-Omni."""


@dataclass(frozen=True, kw_only=True)
class VisionZipSettings(Settings):
    """Settings of VisionZip.

    Attributes:
        contextual_ratio: share of tokens that become anchors (0.05).
    """

    contextual_ratio: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual_ratio <= 1:
            raise CompressorError(f"visionzip: contextual_ratio is {self.contextual_ratio}; it is a share in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class VisionZipIntactSettings(VisionZipSettings):
    """Settings of VisionZip with intact audio.

    Attributes:
        video_floor: share of the video that stays whatever the total (0.05).
        seed: of the audio that has to go then.
    """

    video_floor: float = PUBLISHED_VIDEO_FLOOR
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.video_floor <= 1:
            raise CompressorError(f"visionzip: video_floor is {self.video_floor}; it is a share in (0, 1]")


class Zip(NamedTuple):
    """What stays, and what joins it.

    Attributes:
        keep: bool, dominant and contextual tokens.
        target: long, the anchor that a token joins.
        weight: share of the token in what is added to its anchor; 0 if it joins none.
    """

    keep: Tensor
    target: Tensor
    weight: Tensor


@register("visionzip_om")
class VisionZipOm(Compressor):
    """See the module's docstring; settings in `VisionZipSettings`."""

    settings: VisionZipSettings
    settings_type: ClassVar[type[Settings]] = VisionZipSettings
    segment_kinds: ClassVar[Mapping[Modality, SegmentKind]] = {Modality.VIDEO: "frame", Modality.AUDIO: "window"}
    zipped: ClassVar[tuple[Modality, ...]] = MEDIA

    @property
    def needs(self) -> tuple[Need, ...]:
        """Attention received and keys of the zipped modalities."""
        return tuple(need for modality in self.zipped for need in _needs_of(modality))

    def plan(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> Plan:
        """Keep dominant and contextual tokens. See `Compressor.plan`."""
        video, audio = (self._zip(modality, layout, needs) for modality in MEDIA)
        return self.make_plan(layout, video.keep | audio.keep, merge=self._merge(video, audio, layout))

    @property
    def rank_needs(self) -> tuple[Need, ...]:
        """Attention received; keys say what is merged only."""
        return tuple(_needs_of(modality)[0] for modality in self.zipped)

    def rank(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> tuple[Ranked, Ranked]:
        """Without what is merged. See `Compressor.rank`."""
        return self._in_order(Modality.VIDEO, layout, needs), self._in_order(Modality.AUDIO, layout, needs)

    def segments_of(self, modality: Modality, layout: TokenLayout) -> Segments:
        """Frames of video, and windows of audio."""
        if modality == Modality.AUDIO and modality in self.zipped and self.settings.rounding == "official":
            return layout.segments("flat", modality, PUBLISHED_AUDIO_CUT)
        return super().segments_of(modality, layout)

    def official_counts(self, modality: Modality, layout: TokenLayout, sizes: np.ndarray) -> np.ndarray:
        """Dominant and contextual tokens together."""
        dominant = self._official_dominant(modality, layout, sizes)
        return dominant + np.minimum(self._anchors(sizes), sizes - dominant)

    def split_counts(self, modality: Modality, layout: TokenLayout) -> tuple[np.ndarray, np.ndarray]:
        """Dominant and contextual tokens per segment, [B, G] each."""
        sizes, kept = self.segments_of(modality, layout).sizes, self.counts_of(modality, layout)
        if self.settings.rounding == "official":
            dominant = self._official_dominant(modality, layout, sizes)
        else:
            dominant = kept - np.minimum(self._anchors(sizes), np.minimum(kept - 1, sizes - kept)).clip(0)
        return dominant, kept - dominant

    def _official_dominant(self, modality: Modality, layout: TokenLayout, sizes: np.ndarray) -> np.ndarray:
        """max(int((R - contextual_ratio) n), 1) in single precision; none unless R is above contextual_ratio."""
        share = self.shares_of(modality, layout) - self.settings.contextual_ratio
        counts = np.floor(sizes.astype(np.float32) * share.astype(np.float32)).astype(np.int64)
        return np.where(share > 0, np.maximum(counts, np.minimum(sizes, 1)), 0)

    def _anchors(self, sizes: np.ndarray) -> np.ndarray:
        """Anchors of segments that have tokens to spare, at least one."""
        ratio, official = self.settings.contextual_ratio, self.settings.rounding == "official"
        rounded = round_product(sizes, ratio) if official else round_count(sizes * ratio)
        return np.maximum(rounded, np.minimum(sizes, 1)) * (ratio > 0)

    def _zip(self, modality: Modality, layout: TokenLayout, needs: Needs | None) -> Zip:
        """One modality's part of the plan, [B, S] each."""
        segments = self.segments_of(modality, layout)
        attention, keys = (segments.gather(self.statistic(needs, need)) for need in _needs_of(modality))
        dominant, contextual = self.split_counts(modality, layout)
        part = zip_tokens(attention, keys, segments.valid, segments.sizes, dominant, contextual)
        position = segments.index.gather(-1, part.target)
        return Zip(
            segments.scatter(part.keep, False), segments.scatter(position, 0), segments.scatter(part.weight, 0.0)
        )

    def _in_order(self, modality: Modality, layout: TokenLayout, needs: Needs | None) -> Ranked:
        """Dominant tokens, then contextual ones, then the rest; each of them by attention."""
        segments = self.segments_of(modality, layout)
        attention = segments.gather(self.statistic(needs, _needs_of(modality)[0]))
        dominant, contextual = choose_tokens(
            attention, segments.valid, segments.sizes, *self.split_counts(modality, layout)
        )
        order = tiered(2 * dominant.long() + contextual.long(), attention, segments.valid)
        return self.ranked(modality, segments.scatter(order, 0.0), layout, None)

    def _merge(self, video: Zip, audio: Zip, layout: TokenLayout) -> Merge | None:
        """What joins the anchors."""
        joined = np.zeros(layout.batch_size, dtype=np.int64)
        for modality in self.zipped:
            dropped = self.segments_of(modality, layout).sizes - self.counts_of(modality, layout)
            joined += (dropped * (self.split_counts(modality, layout)[1] > 0)).sum(axis=1)
        if not joined.any():
            return None
        target, weight = video.target + audio.target, video.weight + audio.weight
        source = (weight == 0).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(joined.max())]
        return Merge(source, target.gather(1, source), weight.gather(1, source), torch.ones_like(weight))


@register("visionzip")
class VisionZip(VisionZipOm):
    """See the module's docstring; settings in `VisionZipIntactSettings`."""

    settings: VisionZipIntactSettings
    settings_type = VisionZipIntactSettings
    segment_kinds: ClassVar[Mapping[Modality, SegmentKind]] = {Modality.VIDEO: "frame", Modality.AUDIO: "all"}
    zipped = (Modality.VIDEO,)
    audio_intact = True

    def asked(self, layout: TokenLayout) -> Budget:
        """See `Compressor.asked`; a total alone leaves audio whole as long as the video keeps its floor."""
        if not self._total_alone:
            return super().asked(layout)
        total = asked_budget(self.settings, layout, audio_intact=False).total
        video, audio = (layout.counts(modality) for modality in MEDIA)
        floor = np.maximum(round_count(video * self.settings.video_floor), np.minimum(video, 1))
        kept_audio = np.minimum(audio, total - np.minimum(floor, total))
        return Budget(total - kept_audio, kept_audio)

    def shares_of(self, modality: Modality, layout: TokenLayout) -> np.ndarray:
        """See `Compressor.shares_of`."""
        if not self._total_alone:
            return super().shares_of(modality, layout)
        if self.settings.rounding == "official":
            return intact_shares(self.ratio_of(Modality.VIDEO), layout, self.settings.video_floor)[modality]
        return (self.asked(layout).of(modality) / np.maximum(layout.counts(modality), 1))[:, None]

    def official_counts(self, modality: Modality, layout: TokenLayout, sizes: np.ndarray) -> np.ndarray:
        """See `VisionZipOm.official_counts`; of audio max(1, round(ratio * n))."""
        if modality == Modality.VIDEO:
            return super().official_counts(modality, layout, sizes)
        return np.maximum(round_product(sizes, self.shares_of(modality, layout)), np.minimum(sizes, 1))

    @property
    def _total_alone(self) -> bool:
        return self.settings.video_ratio is None and self.settings.audio_ratio is None

    def _zip(self, modality: Modality, layout: TokenLayout, needs: Needs | None) -> Zip:
        """Audio is not zipped: if some has to go, chance decides."""
        if modality == Modality.VIDEO:
            return super()._zip(modality, layout, needs)
        scores = random_scores(layout, self.settings.seed)
        nowhere = torch.zeros_like(scores, dtype=torch.long)
        return Zip(self.select(modality, scores, layout, None), nowhere, torch.zeros_like(scores))

    def _in_order(self, modality: Modality, layout: TokenLayout, needs: Needs | None) -> Ranked:
        """Audio by chance."""
        if modality == Modality.VIDEO:
            return super()._in_order(modality, layout, needs)
        return self.ranked(modality, random_scores(layout, self.settings.seed), layout, None)


def choose_tokens(
    attention: Tensor, valid: Tensor, sizes: np.ndarray, dominant: np.ndarray, contextual: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Dominant and contextual tokens of padded segments, [..., L] bool each; see `zip_tokens`."""
    counts = torch.from_numpy(dominant).to(attention.device, non_blocking=True)
    best = topk_mask(attention, valid, counts)
    return best, spaced_anchors(valid & ~best, sizes - dominant, contextual)


def zip_tokens(
    attention: Tensor, keys: Tensor, valid: Tensor, sizes: np.ndarray, dominant: np.ndarray, contextual: np.ndarray
) -> Zip:
    """Dominant and contextual tokens of padded segments.

    Args:
        attention: [..., L], attention that each token receives.
        keys: [..., L, d].
        valid: [..., L] bool.
        sizes, dominant, contextual: [...] on the host: tokens, and how many of them become which.

    Returns:
        see `Zip`; targets are places in the segment.
    """
    best, anchors = choose_tokens(attention, valid, sizes, dominant, contextual)
    keep, most = best | anchors, max(int(contextual.max(initial=0)), 1)
    return Zip(keep, *spread_over_anchors(keys, anchors, valid & ~keep, most))


def _needs_of(modality: Modality) -> tuple[Need, Need]:
    span: Span = "frame" if modality == Modality.VIDEO else "window"
    return Need("attention_received", modality, span), Need("keys", modality)
