"""FastVID: scenes, their most attended tokens, and anchors into which the rest is merged (arXiv 2503.11187).

1. Consecutive frames whose mean tokens are alike form a scene.
2. Of every scene the most attended tokens stay as they are (salient).
3. Every few frames, counted from the end of the scene, is an anchor frame: the density peaks among its other tokens
   stay as well, and what is dropped from the scene is averaged into the most similar of them (context).

There are two published variants. `llava` spreads salient tokens over all frames; `qwen` leaves out frames that hardly
differ from the next. Its saliency is the attention of a frame's mean query; `llava` takes the pooling head of its
encoder, for which attention received in the frame stands in here. A frame is one grid. Audio stays whole, or is dropped
at random if `audio_ratio` says so.

`rounding="official"` reproduces the published counts, which depend on the scenes; the budget is then an upper bound.
Anchor frames take up the scene one after the other, so a dropped token goes into each of them. `rounding="exact"`
meets the total: remainders are kept, what an anchor frame has no room for goes to salient tokens of the scene, and a
dropped token is merged once, into the most similar of all targets of the scene. The random numbers that break ties of
the density are left out, and a video of fewer frames than scenes is no error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from omnisieve.compressors.base import Budget, Compressor, CompressorError, Need, Needs, Settings, register
from omnisieve.compressors.random import random_scores
from omnisieve.layout import Modality, SegmentKind, Segments, TokenLayout
from omnisieve.ops.budget import floor_product
from omnisieve.ops.clustering import best_of_group, density_peaks_with_itself, distance_scale
from omnisieve.ops.groups import group_sum, rank_in_group, share_in_turns
from omnisieve.ops.merge import merge_into_targets
from omnisieve.ops.similarity import cosine, segment_mean
from omnisieve.ops.topk import topk_mask
from omnisieve.plan import Merge, Plan

NEIGHBOURS = 4
"""Of the density, the token itself among them."""


@dataclass(frozen=True, kw_only=True)
class FastVidSettings(Settings):
    """Settings of FastVID.

    Attributes:
        variant: "llava" or "qwen", see the module's docstring.
        scenes: into which a video is cut, at least (c, 8).
        scene_similarity: cosine of two frames below which a scene ends (tau); None: 0.9, or 0.84 of "qwen".
        still_similarity: cosine from which on "qwen" leaves the earlier of two frames out (0.95).
        context_ratio: share of the kept tokens that are context (d, 0.4).
        anchor_interval: every so many frames one is an anchor (p, 4).
        least_own: share of itself that a context token keeps, at least (alpha, 0.6).
        seed: of the audio that is dropped where `audio_ratio` asks for it.
    """

    variant: Literal["llava", "qwen"] = "llava"
    scenes: int = 8
    scene_similarity: float | None = None
    still_similarity: float = 0.95
    context_ratio: float = 0.4
    anchor_interval: int = 4
    least_own: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("llava", "qwen"):
            raise CompressorError(f"fastvid: variant is {self.variant!r}; choose 'llava' or 'qwen'")
        for name in ("scenes", "anchor_interval"):
            if getattr(self, name) < 1:
                raise CompressorError(f"fastvid: {name} is {getattr(self, name)}; it must be at least 1")
        for name in ("context_ratio", "least_own"):
            if not 0 <= getattr(self, name) <= 1:
                raise CompressorError(f"fastvid: {name} is {getattr(self, name)}; it is a share in [0, 1]")


@dataclass(frozen=True)
class Scenes:
    """The scenes of a batch, [B, F] each.

    Attributes:
        of: scene of each frame, counted per sample; F where there is no frame.
        length: frames of its scene.
        open: bool, frames that may keep tokens.
        anchor: bool, anchor frames.
        turn: which anchor frame of its scene a frame is.
    """

    of: Tensor
    length: Tensor
    open: Tensor
    anchor: Tensor
    turn: Tensor


@register("fastvid")
class FastVid(Compressor):
    """See the module's docstring; settings in `FastVidSettings`."""

    settings: FastVidSettings
    settings_type = FastVidSettings
    audio_intact = True
    segment_kinds: ClassVar[Mapping[Modality, SegmentKind]] = {Modality.VIDEO: "frame", Modality.AUDIO: "all"}

    @property
    def official(self) -> bool:
        """Whether the published functions are reproduced."""
        return self.settings.rounding == "official"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Attention within each frame of video."""
        received = self.settings.variant == "llava"
        return (Need("attention_received" if received else "mean_query_attention", Modality.VIDEO, "frame"),)

    def plan(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> Plan:
        """Cut into scenes, keep salient tokens and merge the rest into anchors. See `Compressor.plan`."""
        saliency = self.statistic(needs, self.needs[0])
        frames = self.segments_of(Modality.VIDEO, layout)
        tokens = frames.gather(embeds)
        scenes = self.scenes_of(tokens, frames, layout)
        salient_counts, context_counts = self.split(scenes, frames, layout)
        salient = topk_mask(frames.gather(saliency), frames.valid, salient_counts)
        rest = frames.valid & ~salient
        peaks, scale = density_peaks_with_itself(tokens, rest, NEIGHBOURS), distance_scale(tokens, rest, "euclidean")
        targets = topk_mask(peaks, rest, context_counts, scale / tokens.shape[-1])
        audio = self.select(Modality.AUDIO, random_scores(layout, self.settings.seed), layout, None)
        keep = frames.scatter(salient | targets, False) | audio
        merge = self._merge(tokens, rest, targets, scenes, frames, layout)
        return self.make_plan(layout, keep, scores=saliency, merge=merge)

    def budget(self, layout: TokenLayout) -> Budget:
        """Kept tokens; under official rounding an upper bound."""
        return replace(super().budget(layout), exact=not self.official)

    def official_counts(self, modality: Modality, layout: TokenLayout, sizes: np.ndarray) -> np.ndarray:
        """int(ratio * n), at least one; of a frame's video, before scenes are balanced."""
        return np.maximum(floor_product(sizes, self.shares_of(modality, layout)), np.minimum(sizes, 1))

    def scenes_of(self, tokens: Tensor, frames: Segments, layout: TokenLayout) -> Scenes:
        """Cut frames [B, F, P, D] at the `scenes - 1` largest changes of an item and at all large ones."""
        s, count = self.settings, tokens.shape[1]
        first, there = layout.places(frames) == 0, frames.sizes > 0
        joined = np.pad(there[:, 1:] & ~first[:, 1:], ((0, 0), (0, 1)))
        present, followed, item = (
            torch.from_numpy(a).to(tokens.device, non_blocking=True) for a in (there, joined, first.cumsum(axis=1) - 1)
        )
        mean = segment_mean(tokens, frames.valid)
        likeness = torch.nn.functional.pad(cosine(mean[:, :-1], mean[:, 1:]), (0, 1))
        changes = best_of_group(-likeness, torch.where(followed, item, count), count, s.scenes - 1, 1.0)
        last = ~followed | changes | (likeness < self._threshold)

        scene = torch.nn.functional.pad(last[:, :-1], (1, 0)).cumsum(dim=-1).masked_fill(~present, count)
        open_ = present & (last | (likeness < s.still_similarity)) if s.variant == "qwen" else present
        ramp = torch.arange(count, device=tokens.device).expand_as(scene)
        from_end = rank_in_group(-ramp, torch.where(open_, scene, count), count)
        anchor = open_ & (from_end % s.anchor_interval == 0)
        turn = rank_in_group(ramp, torch.where(anchor, scene, count), count) * anchor
        return Scenes(scene, group_sum(present.long(), scene, count), open_, anchor, turn)

    def split(self, scenes: Scenes, frames: Segments, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Salient and context tokens of every frame, [B, F] each."""
        s, count = self.settings, scenes.of.shape[1]
        kept, size = (
            torch.from_numpy(n).to(scenes.of.device, non_blocking=True)
            for n in (self.counts_of(Modality.VIDEO, layout), frames.sizes)
        )
        total, ramp = group_sum(kept, scenes.of, count), torch.arange(count, device=size.device).expand_as(size)
        turns = partial(share_in_turns, group=scenes.of, groups=count, most=frames.index.shape[-1])
        if self.official and s.variant == "llava":
            own = _floor(kept, s.context_ratio)
            anchors = group_sum(scenes.anchor.long(), scenes.of, count)
            context = (own * scenes.length // anchors.clamp(min=1)) * scenes.anchor
            return kept - own, torch.minimum(context, size - kept + own)
        context_total = _floor(total, s.context_ratio)
        if s.variant == "qwen":
            context_total = torch.minimum(context_total.clamp(min=1), total)
            room = torch.where(scenes.length > 1, size // 2, size)
        else:
            room = size - (total - context_total + scenes.length - 1) // scenes.length.clamp(min=1)
        context = turns(context_total, room * scenes.anchor, -ramp)
        if self.official:
            salient = turns(total - context_total, size * scenes.open, ramp)
            return torch.minimum(salient, size - context), context
        left = total - group_sum(context, scenes.of, count)
        salient = turns(left, (size - context) * scenes.open, ramp)
        # Few open frames may not have the room.
        left = left - group_sum(salient, scenes.of, count)
        return salient + turns(left, size - context - salient, ramp), context

    @property
    def _threshold(self) -> float:
        given, default = self.settings.scene_similarity, {"llava": 0.9, "qwen": 0.84}
        return default[self.settings.variant] if given is None else given

    def _merge(
        self, tokens: Tensor, rest: Tensor, targets: Tensor, scenes: Scenes, frames: Segments, layout: TokenLayout
    ) -> Merge | None:
        """What goes into the context tokens; nothing does where the whole video stays."""
        s, shape = self.settings, rest.shape
        kept, there = self.counts_of(Modality.VIDEO, layout).sum(axis=1), layout.counts(Modality.VIDEO)
        # A scene of "qwen" has at least one context token.
        most = np.minimum(np.floor(kept * s.context_ratio).astype(np.int64) + shape[1] * (s.variant == "qwen"), kept)
        pruned = (kept < there) | self.official
        if not (pruned & (most > 0)).any():
            return None
        frame_number = layout.places(frames) * (frames.sizes > 0)
        # The largest changes are cut whatever the content, which bounds the length of a scene.
        longest = max(int(frame_number.max()) + 1 - (s.scenes - 1), 1)
        pool = rest & torch.from_numpy(pruned).to(rest.device, non_blocking=True)[:, None, None]
        scene, turn = (
            values.unsqueeze(-1).expand(shape).flatten(1)
            for values in (scenes.of, scenes.turn if self.official else torch.zeros_like(scenes.turn))
        )
        source, target, weight, own = merge_into_targets(
            tokens.flatten(1, 2),
            pool.flatten(1),
            targets.flatten(1),
            scene,
            turn,
            most=int(most.max()),
            turns=-(-longest // s.anchor_interval) if self.official else 1,
            least_own=s.least_own,
            themselves=s.variant == "llava",
        )
        position = frames.index.flatten(1)
        own = frames.scatter(own.reshape(shape), 1.0)
        return Merge(position.gather(1, source), position.gather(1, target), weight, own)


def _floor(count: Tensor, share: float) -> Tensor:
    """`int(count * share)`, binary fractions included."""
    return (count.double() * share).floor().long()
