"""SEATS: diverse tokens enter the LLM, fewer and fewer pass its middle layers, none its last ones (Xin et al., 2026).

1. Before the LLM each modality keeps lambda times its ratio (`windivprune`).
2. After three layers the tokens that the last text token attends to stay: windows compete for tokens, then modalities
   inside a window (`topdown`). How many follows from the layers' mean (`layer_schedules.BlockDecay`).
3. Late layers see text only, and so does everything decoded: the cache of all layers is cut along (`kv_policy`).

Where paper and code differ: the code scores with a layer applied to its own output, which is nobody's attention; that
is the default here too, and `next_layer` takes the attention of the layer that follows. Scores are of the order of one
over the length, so that windows weigh about the same at the published temperature; `normalize_scores` changes that.

`rounding="official"` pairs the i-th run of video with the i-th of audio in what is left, keeps published ratios of that
and repairs budgets in the published order, which can miss a sum by a few tokens. A run is 2 s of one modality in
Qwen2.5-Omni below the frame cap, and a grid or its second of sound in Qwen3-Omni. `rounding="exact"` takes 2-s windows,
gives each modality exactly its own and fits the mean over layers of each modality to its ratio: the sum over layers
is missed by half the layers of the last level at most (3 of 28), by more only where a handful of tokens is left.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from omnisieve.compressors.base import Budget, Compressor, CompressorError, Needs, UnreachableRatioError, register
from omnisieve.compressors.inner import Cut, InnerCompressor, InnerSettings, KvPolicy, ScoreAt
from omnisieve.compressors.layer_schedules import BlockDecay, Transitions, transitions
from omnisieve.compressors.ratios import RATIOS
from omnisieve.compressors.topdown import select_top_down
from omnisieve.compressors.windivprune import WinDivPrune, WinDivPruneSettings
from omnisieve.layout import MEDIA, Modality, TokenLayout
from omnisieve.ops.budget import round_count
from omnisieve.plan import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SeatsSettings(InnerSettings):
    """Settings of SEATS.

    Attributes:
        lambda_: what enters the LLM, as a multiple of the ratio (1.4). Under exact rounding it is clipped to what the
            depth of the model allows.
        tau: temperature of the softmax over windows (0.1 in the paper; 0.3 in the code for Qwen3).
        normalize_scores: "none" (published), "length" (times the length of the sequence) or "zscore" (over the media
            tokens of a sample), before windows are weighed.
        next_layer: score with the attention of the layer after the cut instead of the cut layer on its own output.
        steps: "exp" (published), each fall of the ratio e times the one before, or "equal".
        late_removal: whether late layers see text only; without it the third level lasts to the end.
        attention_weighted: whether encoder attention weighs the first stage's distances.
        transition_layers: L_s, L_m1, L_m2 and L_l, 1-based; None takes the published ones, or their fractions of
            other depths.
        kv_policy: see `InnerSettings`; SEATS cuts the cache of all layers.
    """

    lambda_: float = 1.4
    tau: float = 0.1
    normalize_scores: Literal["none", "length", "zscore"] = "none"
    next_layer: bool = False
    steps: Literal["exp", "equal"] = "exp"
    late_removal: bool = True
    attention_weighted: bool = True
    transition_layers: Transitions | None = None
    kv_policy: KvPolicy = "prune_all_layers"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("normalize_scores", ("none", "length", "zscore")), ("steps", ("exp", "equal"))):
            if getattr(self, name) not in allowed:
                raise CompressorError(f"seats: {name} is {getattr(self, name)!r}; choose one of {allowed}")
        if self.lambda_ < 1 or self.tau <= 0:
            raise CompressorError(f"seats: lambda_ is {self.lambda_}, tau {self.tau}; need lambda_ >= 1 and tau > 0")
        if self.transition_layers is not None:
            # A list, from YAML, has no hash.
            object.__setattr__(self, "transition_layers", tuple(self.transition_layers))
            start, middle, deep, late = self.transition_layers
            if not 1 <= start < middle < deep < late:
                raise CompressorError(f"seats: transition_layers {self.transition_layers} must increase from 1 on")


@register("seats")
class Seats(InnerCompressor):
    """See the module's docstring; settings in `SeatsSettings`."""

    settings: SeatsSettings
    settings_type = SeatsSettings

    def for_depth(self, num_layers: int) -> Self:
        """See `InnerCompressor.for_depth`; says so where lambda must be another."""
        twin = super().for_depth(num_layers)
        if abs(twin.lambda_ - self.settings.lambda_) > 1e-9:
            logger.warning(
                "seats: lambda_ %g becomes %.4g on %d layers", self.settings.lambda_, twin.lambda_, num_layers
            )
        return twin

    @property
    def official(self) -> bool:
        """Whether the published functions are reproduced."""
        return self.settings.rounding == "official"

    @property
    def decay(self) -> BlockDecay:
        """How many tokens each layer sees. At a ratio of 1 no layer loses any."""
        s = self.settings
        try:
            at = s.transition_layers or transitions(self.num_layers)
        except ValueError as error:
            raise CompressorError(f"seats: {error}") from error
        if at[-1] > self.num_layers:
            raise CompressorError(f"seats: transition_layers {at} do not fit the model's {self.num_layers} layers")
        whole = all(ratio == 1 for ratio in self._ratios().values())
        return BlockDecay(self.num_layers, at, s.late_removal and not whole, s.steps)

    @property
    def lambda_(self) -> float:
        """lambda as used: under exact rounding one that is feasible on this depth and makes no share above 1."""
        if self.official:
            return self.settings.lambda_
        low, high = self.decay.feasible
        return min(max(self.settings.lambda_, low), high, 1 / max(self._ratios().values()))

    # The first stage.

    def own_first(self) -> Compressor:
        """Diversity inside windows."""
        s = self.settings
        fields = self.first_fields()
        return WinDivPrune(WinDivPruneSettings(rounding=s.rounding, attention_weighted=s.attention_weighted, **fields))

    def first_fields(self) -> dict[str, Any]:
        """lambda times the ratios."""
        return {name: min(self.lambda_ * ratio, 1.0) for name, ratio in self._ratios().items()}

    def plan(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> Plan:
        """See `InnerCompressor.plan`; published cuts leave a number of tokens that only the scores decide."""
        plan = super().plan(embeds, layout, needs)
        return replace(plan, exact=plan.exact and not self.official)

    # The cuts.

    def cuts(self) -> tuple[Cut, ...]:
        """After the layers where a level ends."""
        decay = self.decay
        scored = [Cut(after, self._score_at(after)) for after in decay.cuts[: len(decay.used) - 1]]
        return (*scored, *(Cut(after) for after in decay.cuts[len(scored) :]))

    def counts(self, layout: TokenLayout) -> np.ndarray:
        """See `InnerCompressor.counts`; upper bounds under official rounding."""
        left = self._bounds(layout) if self.official else self._levels(layout).sum(axis=1)
        return np.pad(left[1:], ((0, int(self.decay.late_removal)), (0, 0)))

    def keep_after(self, cut: int, scores: Tensor, alive: Tensor, layout: TokenLayout) -> Tensor:
        """Top-down selection. See `InnerCompressor.keep_after`."""
        if self.official:
            ratio = self.decay.keep_ratios(self.lambda_)[cut]
            present = torch.stack([(alive & layout.mask(modality)).sum(dim=1) for modality in MEDIA], dim=1)
            kept = (present.double() * ratio).round().long().clamp(min=1)
        else:
            levels = layout.derived((self.name, self.settings, self.num_layers), lambda: self._levels(layout))
            kept = levels[cut + 1].T
        normal, tau = self._normalisation(scores, alive, layout), self.settings.tau
        return select_top_down(scores, alive, layout, kept, tau=tau, official=self.official, normal=normal)

    def budget(self, layout: TokenLayout) -> Budget:
        """Kept tokens averaged over layers, each modality apart; upper bounds under official rounding."""
        first, spans = self.first.budget(layout), self.decay.spans[self.decay.used]
        if self.official:
            bounds = self._bounds(layout)
            video, audio = (np.ceil(spans @ np.minimum(bounds, first.of(m)) / self.num_layers) for m in MEDIA)
            return Budget(video.astype(np.int64), audio.astype(np.int64), exact=False)
        video, audio = round_count(np.einsum("l,lmb->mb", spans, self._levels(layout)) / self.num_layers)
        return Budget(video, audio, first.exact)

    def _ratios(self) -> dict[str, float]:
        return {name: ratio for name in RATIOS if (ratio := getattr(self.settings, name)) is not None}

    def _score_at(self, after: int) -> ScoreAt:
        return ScoreAt(after + 1, "input") if self.settings.next_layer else ScoreAt(after, "output")

    def _normalisation(self, scores: Tensor, alive: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor] | None:
        """What is taken off the scores, and what they are multiplied by, before windows are weighed: [B, 1] each."""
        size = alive.sum(dim=1, keepdim=True)
        if self.settings.normalize_scores == "length":
            fixed = layout.mask(Modality.TEXT, Modality.IMAGE).sum(dim=1, keepdim=True)
            return torch.zeros_like(scores[:, :1]), size + fixed
        if self.settings.normalize_scores == "zscore":
            mean = (scores * alive).sum(dim=1, keepdim=True) / size.clamp(min=1)
            centred = (scores - mean) * alive
            spread = (centred.square().sum(dim=1, keepdim=True) / size.clamp(min=1)).sqrt()
            return mean, 1 / spread.clamp(min=1e-12)
        return None

    def _levels(self, layout: TokenLayout) -> np.ndarray:
        """Tokens at each used level, [levels, 2, B], video before audio."""
        first, asked, decay = self.first.budget(layout), self.asked(layout), self.decay
        for modality in MEDIA:
            # First stage and total are rounded: a token more or less is no other ratio.
            entering, wanted = first.of(modality), asked.of(modality) * decay.num_layers
            missed = (wanted > entering * decay.spans.sum() + decay.num_layers) | (
                wanted < entering * decay.spans[0] - decay.num_layers
            )
            if missed.any():
                raise self._unreachable(modality, int(np.argmax(missed)), first, layout)
        return np.stack([decay.fit(first.of(m), asked.of(m)) for m in MEDIA], axis=1)[decay.used]

    def _unreachable(self, modality: Modality, sample: int, first: Budget, layout: TokenLayout) -> Exception:
        """The error for a sample whose mean over layers cannot be what was asked."""
        decay, name = self.decay, modality.name.lower()
        size, entering = (int(n[sample]) for n in (layout.counts(modality), first.of(modality)))
        low, high = (entering * layers / (size * decay.num_layers) for layers in (decay.spans[0], decay.spans.sum()))
        cure = ", or late_removal: false" if decay.late_removal else ""
        return UnreachableRatioError(
            f"seats: {entering} of {size} {name} tokens of sample {layout.name_of(sample)} enter the LLM, and "
            f"{decay.num_layers - decay.spans.sum()} of its {decay.num_layers} layers see none of them; as a mean over "
            f"layers {low:.3f} to {high:.3f} are reachable: change the ratio of {name}{cure}"
        )

    def _bounds(self, layout: TokenLayout) -> np.ndarray:
        """The most tokens that published rounding leaves at each used level, [levels, B]."""
        left = [self.first.budget(layout).total]
        windows = np.max([(layout.segments("run", m).sizes > 0).sum(axis=1) for m in MEDIA], axis=0)
        for ratio in self.decay.keep_ratios(self.lambda_):
            # Two counts are rounded and at least 1; a window keeps a token at least, and one of each modality.
            budget = np.maximum(np.floor(ratio * left[-1]).astype(np.int64) + 2, windows)
            left.append(np.minimum(left[-1], budget + windows))
        return np.stack(left)
