"""OmniDrop: layer by layer the tokens that the question does not ask for leave, few at first and many from the middle
on (Park et al., arXiv 2605.14458). There is no published code.

1. Before the LLM (section 3.4): the audio tokens that the encoder attends to most, and DyCoke's temporal rule for
   video; 70 % and 40 % in the paper.
2. After layer l of 0 to L - 2 a share p_l of the tokens that are left goes, video and audio together: those that the
   text behind them attends to least in that layer (section 3.2). p_l rises in a sigmoid (section 3.1).
3. From the middle layers on (section 3.3) twice as many tokens are candidates, and a token far in time from the most
   attended one is spared. Attention is of the order of one over the length while the distance counts up to
   `lambda_div`, so that among the candidates the distance decides; `normalize: max` brings both to one scale.

`rounding="exact"`: the mean over layers is exactly the budget of the ratio, for every sample. p_final is solved from
it, and p_init is 0 or, where less than 0.6 of what enters the LLM is to stay on average, 0.02. The first stage keeps
the paper's shares as long as the schedule need not be steeper than the steepest published one (p_final 0.5) nor has
less than a fifth to prune; beyond, both shares shrink or grow with the ratio.
`rounding="official"`: the paper's shares, p_init and p_final as given, and floor(n p_l) of n tokens pruned; the mean
over layers then follows from these. The paper's own settings retain 28.8 and 20.6 % where it says 30 and 20. Windows,
in which distances are counted, last 2 s by time under either rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from omnisieve.compressors.base import (
    Compressor,
    CompressorError,
    Need,
    Needs,
    Settings,
    UnreachableRatioError,
    register,
)
from omnisieve.compressors.dycoke import DyCokeVa
from omnisieve.compressors.inner import Cut, InnerCompressor, InnerSettings, Rows, ScoreAt
from omnisieve.compressors.layer_schedules import TINY, ProgressivePruning
from omnisieve.compressors.ranked import Ranked
from omnisieve.compressors.saliency import relative_to_window
from omnisieve.layout import Modality, SegmentKind, TokenLayout
from omnisieve.ops.budget import largest_remainder, round_product, round_to_sum
from omnisieve.ops.similarity import cosine_to_mean
from omnisieve.ops.topk import descending_rank, settled, topk_mask

PUBLISHED_SHARES = {Modality.VIDEO: 0.4, Modality.AUDIO: 0.7}
PUBLISHED_ENTRY = (0.4 * 288 + 0.7 * 50) / 338
"""What the paper lets into the LLM of 2 s of its clips: 288 video and 50 audio tokens."""
STEEPEST = (0.02, 0.5)
"""The largest published p_init and p_final."""
PUBLISHED_L_DIV = {28: 14, 36: 19}


@dataclass(frozen=True, kw_only=True)
class OmniDropSettings(InnerSettings):
    """Settings of OmniDrop.

    Attributes:
        p_init, p_final: shares pruned after the first and after the last but one layer. None: see the module's
            docstring. p_final can be given under official rounding only.
        beta, t_mid: slope and midpoint of the sigmoid (20, 0.5; t_mid 0.55 for 3B at 20 %).
        schedule: "sigmoid" or "exponential".
        query: the rows whose attention counts: text behind the media, all text, or the last text token.
        lambda_div: weight of the distance in time (0.2); 0: attention alone.
        l_div: first layer, 0-based, whose cut spares what is far; None: 14 of 28, 19 of 36, else half the depth.
        normalize: "none" (published) or "max": attention relative to the largest of the sample.
    """

    p_init: float | None = None
    p_final: float | None = None
    beta: float = 20.0
    t_mid: float = 0.5
    schedule: Literal["sigmoid", "exponential"] = "sigmoid"
    query: Rows = "text_after_media"
    lambda_div: float = 0.2
    l_div: int | None = None
    normalize: Literal["none", "max"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "schedule": ("sigmoid", "exponential"),
            "query": ("last_text", "text_after_media", "all_text"),
            "normalize": ("none", "max"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise CompressorError(f"omnidrop: {name} is {getattr(self, name)!r}; choose one of {allowed}")
        for name in ("p_init", "p_final"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise CompressorError(f"omnidrop: {name} is {share}; it is a pruned share and must lie in [0, 1]")
        if self.schedule == "exponential" and self.p_init == 0:
            raise CompressorError("omnidrop: the exponential schedule multiplies p_init; it must be above 0")
        if self.p_final is not None and self.rounding == "exact":
            raise CompressorError("omnidrop: p_final follows from the ratio; give rounding: official to set it")


class IntraModality(DyCokeVa):
    """The first stage: attended audio, and of four frames one whole and what changes in the others.

    Under exact rounding frames that stay whole give way where the budget is smaller than they are.
    """

    name = "omnidrop"
    segment_kinds: ClassVar[Mapping[Modality, SegmentKind]] = {Modality.VIDEO: "frame", Modality.AUDIO: "all"}
    compared = (Modality.VIDEO,)

    @property
    def official(self) -> bool:
        """Whether rounding is that of the published code."""
        return self.settings.rounding == "official"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Attention that audio tokens receive in the encoder."""
        return (Need("attention_received", Modality.AUDIO, "global" if self.official else "encoder"),)

    def rank(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> tuple[Ranked, Ranked]:
        """Each modality on its own. See `Compressor.rank`."""
        audio = self.statistic(needs, self.needs[0])
        if not self.official:
            audio = relative_to_window(audio, layout)
        frames = self.segments_of(Modality.VIDEO, layout)
        whole = torch.from_numpy(layout.places(frames) % 4 == 0).to(embeds.device, non_blocking=True)
        spatial = frames.scatter(1 - cosine_to_mean(frames.gather(embeds), frames.valid), 0.0)
        whole = frames.scatter(whole.unsqueeze(-1).expand_as(frames.valid), False)
        video = torch.where(whole, spatial, self.scores_of(Modality.VIDEO, embeds, layout))
        return self.ranked(Modality.VIDEO, video, layout, 1.0), self.ranked(Modality.AUDIO, audio, layout)

    def least(self, modality: Modality, layout: TokenLayout) -> np.ndarray:
        """Nothing under exact rounding."""
        return super().least(modality, layout) * self.official

    def counts_of(self, modality: Modality, layout: TokenLayout) -> np.ndarray:
        """See `Compressor.counts_of`."""
        if modality == Modality.AUDIO or self.official:
            return super().counts_of(modality, layout)
        frames, total = self.segments_of(modality, layout), self.asked(layout).video
        whole = frames.sizes * (layout.places(frames) % 4 == 0)
        first = np.minimum(total, whole.sum(axis=1))
        return largest_remainder(first, whole) + largest_remainder(total - first, frames.sizes - whole)

    def official_counts(self, modality: Modality, layout: TokenLayout, sizes: np.ndarray) -> np.ndarray:
        """Of audio round(ratio * n), halves to even."""
        if modality == Modality.AUDIO:
            return round_product(sizes, self.ratio_of(modality))
        return super().official_counts(modality, layout, sizes)


@register("omnidrop")
class OmniDrop(InnerCompressor):
    """See the module's docstring; settings in `OmniDropSettings`."""

    settings: OmniDropSettings
    settings_type = OmniDropSettings

    @property
    def official(self) -> bool:
        """Whether the paper's shares are kept."""
        return self.settings.rounding == "official"

    @property
    def pruning(self) -> ProgressivePruning:
        """The schedule, but for its ends."""
        s = self.settings
        return ProgressivePruning(self.num_layers, s.beta, s.t_mid, s.schedule)

    # The first stage.

    def own_first(self) -> Compressor:
        """Each modality on its own."""
        return IntraModality(Settings(rounding=self.settings.rounding, **self.first_fields()))

    def first_fields(self) -> dict[str, Any]:
        """The paper's shares, scaled where the ratio asks for more or less than the schedule should prune."""
        return {
            f"{modality.name.lower()}_ratio": min(share * self._scale(self.settings.ratio_of(modality)), 1.0)
            for modality, share in PUBLISHED_SHARES.items()
        }

    def _scale(self, ratio: float) -> float:
        if self.official:
            return 1.0
        p_init = STEEPEST[0] if self.settings.p_init is None else self.settings.p_init
        steep = self.pruning.retention(p_init, max(p_init, STEEPEST[1])).mean()
        return min(max(PUBLISHED_ENTRY, ratio / 0.8), ratio / steep) / PUBLISHED_ENTRY

    # The cuts.

    def cuts(self) -> tuple[Cut, ...]:
        """After every layer but the last."""
        return tuple(Cut(layer, ScoreAt(layer, "input", self.settings.query)) for layer in range(self.num_layers - 1))

    def counts(self, layout: TokenLayout) -> np.ndarray:
        """See `InnerCompressor.counts`."""
        entering, asked = self.first.budget(layout).total, self.asked(layout).total
        p_init, p_final = self._ends(entering, asked, layout)
        if self.official:
            left = [entering]
            for rate in self.pruning.rates(p_init, p_final).T:
                left.append(left[-1] - np.floor(left[-1] * rate).astype(np.int64))
            return np.stack(left[1:])
        sums = np.clip(asked * self.num_layers - entering, 0, entering * (self.num_layers - 1))
        return round_to_sum(entering[:, None] * self.pruning.retention(p_init, p_final)[:, 1:], sums).T

    def keep_after(self, cut: int, scores: Tensor, alive: Tensor, layout: TokenLayout) -> Tensor:
        """The most attended, and from the middle on the most distant of the least attended."""
        kept = layout.derived((self.name, self.settings, self.num_layers), lambda: self.counts(layout))[cut]
        s, l_div = self.settings, self.settings.l_div
        if l_div is None:
            l_div = PUBLISHED_L_DIV.get(self.num_layers, self.num_layers // 2)
        scores = settled(scores, alive)
        if cut >= l_div and s.lambda_div > 0:
            scores = self._spare_the_distant(scores, alive, alive.sum(dim=1) - kept, layout)
        return topk_mask(scores, alive, kept, None)

    def _spare_the_distant(self, scores: Tensor, alive: Tensor, pruned: Tensor, layout: TokenLayout) -> Tensor:
        """Scores of the candidates with their distance to the most attended window; others are out of danger, [B, S].

        Args:
            scores: [B, S], -inf where no token is left.
            alive: [B, S] bool.
            pruned: [B] long, how many go; twice as many are candidates.
            layout: of the whole sequence.
        """
        rank = descending_rank(scores, alive, None)
        safe = rank < (alive.sum(dim=1) - 2 * pruned).unsqueeze(-1)
        window = layout.derived(("window",), lambda: layout.window)
        distance = (window - window.gather(1, scores.argmax(dim=1, keepdim=True))).abs()
        last = window.amax(dim=1, keepdim=True).clamp(min=1)
        if self.settings.normalize == "max":
            scores = scores / scores.amax(dim=1, keepdim=True).clamp(min=1e-30)
        return (scores.double() + self.settings.lambda_div * distance / last).masked_fill(safe, torch.inf)

    def _ends(self, entering: np.ndarray, asked: np.ndarray, layout: TokenLayout) -> tuple[np.ndarray, np.ndarray]:
        """p_init and p_final of each sample, [B] each.

        Raises:
            UnreachableRatioError: more than enters the LLM is asked for, or less than the first layer's part.
        """
        s, layers = self.settings, self.num_layers
        if self.official and s.p_final is not None:
            p_init, p_final = (np.full(len(entering), p or 0.0) for p in (s.p_init, s.p_final))
            return p_init, p_final
        mean = np.where(entering > 0, np.minimum(asked / np.maximum(entering, 1), 1.0), 1.0)
        p_init, p_final = self.pruning.solve(mean, s.p_init)
        # First stage and total are rounded: a token more or less is no other ratio.
        missed = np.abs(entering * self.pruning.retention(p_init, p_final).mean(axis=-1) - asked) > 1
        if missed.any():
            sample = int(np.argmax(missed))
            low, high = (
                entering[sample] * self.pruning.retention(p, q).mean() for p, q in ((1, 1), (s.p_init or TINY, TINY))
            )
            raise UnreachableRatioError(
                f"omnidrop: sample {layout.name_of(sample)} is asked to process {asked[sample]} media tokens on "
                f"average over {layers} layers; {entering[sample]} enter the LLM, reachable are {low:.1f} to {high:.1f}"
                ": change the ratio, p_init or the first stage"
            )
        return p_init, p_final
