"""FastV: of what has passed the first K layers of the LLM only the tokens that the last text token attends to stay.

The score is the attention of layer K, counted from 1, from the last text token, averaged over heads (arXiv 2403.06764).
`fastv_om` keeps the best video and the best audio tokens of a sample, each modality apart, as SEATS evaluates FastV;
`fastv` leaves audio whole, and video pays for both. A retained ratio R is a mean over the L layers, so that the cut
keeps (R L - K) / (L - K); where this leaves nothing R is unreachable.

The published in-place code has no KV cache, and SEATS scores with layer K applied to its own output, which is nobody's
attention: `score: seats_post_layer`. `rounding="official"` keeps max(1, round(ratio * n)). Of `fastv` it truncates the
total behind the cut before the share of the video is solved from it; a video that would fall below a twentieth stays
there, and audio is dropped at random for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from omnisieve.compressors.base import Compressor, register
from omnisieve.compressors.inner import PUBLISHED_DEPTH, Cut, InnerCompressor, InnerSettings, ScoreAt, keep_best
from omnisieve.compressors.random import random_scores
from omnisieve.compressors.ratios import (
    PUBLISHED_VIDEO_FLOOR,
    RATIOS,
    Budget,
    CompressorError,
    UnreachableRatioError,
    asked_budget,
    intact_shares,
)
from omnisieve.layout import MEDIA, Modality, TokenLayout
from omnisieve.ops.budget import largest_remainder, round_count, round_product

PUBLISHED_K = 2


@dataclass(frozen=True, kw_only=True)
class FastvSettings(InnerSettings):
    """Settings of FastV.

    Attributes:
        k: layers that process every token; None scales the published 2 of 28 to the depth of the model.
        score: "attention": of layer k - 1 itself; "seats_post_layer": its norm and projections applied to its output.
    """

    k: int | None = None
    score: Literal["attention", "seats_post_layer"] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in ("attention", "seats_post_layer"):
            raise CompressorError(f"fastv: score is {self.score!r}; choose 'attention' or 'seats_post_layer'")
        if self.k is not None and self.k < 1:
            raise CompressorError(f"fastv: k is {self.k}; at least one layer must see every token")


@dataclass(frozen=True, kw_only=True)
class FastvIntactSettings(FastvSettings):
    """Settings of FastV with intact audio.

    Attributes:
        seed: of the audio that has to go under official rounding.
    """

    seed: int = 0


@register("fastv_om")
class FastvOm(InnerCompressor):
    """See the module's docstring; settings in `FastvSettings`."""

    settings: FastvSettings
    settings_type = FastvSettings

    def cuts(self) -> tuple[Cut, ...]:
        """One, after layer K - 1."""
        layer = self._full_layers() - 1
        return (Cut(layer, ScoreAt(layer, "input" if self.settings.score == "attention" else "output")),)

    def counts(self, layout: TokenLayout) -> np.ndarray:
        """See `InnerCompressor.counts`."""
        return self._after(layout).total[None]

    def keep_after(self, cut: int, scores: Tensor, alive: Tensor, layout: TokenLayout) -> Tensor:
        """Of each modality the best. See `InnerCompressor.keep_after`."""
        after = self._after(layout)
        best = [
            keep_best(
                self.order_of(modality, scores, layout),
                alive,
                layout.segments("all", modality),
                after.of(modality)[:, None],
            )
            for modality in MEDIA
        ]
        return torch.stack(best).any(dim=0)

    def order_of(self, modality: Modality, scores: Tensor, layout: TokenLayout) -> Tensor:
        """What the tokens of a modality are ranked by, [B, S]: their scores."""
        return scores

    def first_fields(self) -> dict[str, Any]:
        """A first stage keeps the square root of each ratio: halfway, by factors."""
        whole = {"audio_ratio": 1.0} if self._solved == Modality.VIDEO else {}
        return whole | {name: ratio**0.5 for name, ratio in self._ratios().items()}

    def behind(self, ratio: float) -> float:
        """The share of all tokens that the cut keeps, so that the mean over layers is `ratio`.

        Raises:
            UnreachableRatioError: nothing would be left.
        """
        full, layers = self._full_layers(), self.num_layers
        # In the order of the published code: what it makes of half a token depends on it.
        converted = (ratio * layers - full * (1.0 if self.settings.first is None else ratio**0.5)) / (layers - full)
        if converted <= 0:
            raise UnreachableRatioError(
                f"{self.name}: ratio {ratio:g} is a mean over {layers} layers, of which "
                f"{full} process all that enters the LLM; reachable are ratios above "
                f"{self.mean(0.0):.4f}, up to 1"
            )
        return min(converted, 1.0)

    def mean(self, behind: float) -> float:
        """The ratio that `behind` turns into this share."""
        full = self._full_layers() / self.num_layers
        if self.settings.first is None:
            return full + (1 - full) * behind
        return ((full + (full**2 + 4 * (1 - full) * behind) ** 0.5) / 2) ** 2

    def budget(self, layout: TokenLayout) -> Budget:
        """Averaged over layers, split as the sums over layers are."""
        first, after, full = self.first.budget(layout), self._after(layout), self._full_layers()
        sums = np.stack([full * first.of(m) + (self.num_layers - full) * after.of(m) for m in MEDIA], axis=1)
        video, audio = largest_remainder(round_count(sums.sum(axis=1) / self.num_layers), sums).T
        return Budget(video, audio, first.exact)

    def official_counts(self, modality: Modality, layout: TokenLayout, sizes: np.ndarray) -> np.ndarray:
        """max(1, round(ratio * n)), halves to even, binary fractions included."""
        return np.maximum(round_product(sizes, self.shares_of(modality, layout)), np.minimum(sizes, 1))

    def _full_layers(self) -> int:
        """K."""
        if self.settings.k is None:
            return max(1, round(self.num_layers * PUBLISHED_K / PUBLISHED_DEPTH))
        if self.settings.k >= self.num_layers:
            raise CompressorError(f"{self.name}: k is {self.settings.k}, the model has {self.num_layers} layers")
        return self.settings.k

    def _ratios(self) -> dict[str, float]:
        return {name: ratio for name in RATIOS if (ratio := getattr(self.settings, name)) is not None}

    def _after(self, layout: TokenLayout) -> Budget:
        """What the cut leaves of each modality."""
        kept = self.at(**{name: self.behind(ratio) for name, ratio in self._ratios().items()})
        self.check_cut(kept, layout)
        first = self.first.budget(layout)
        video, audio = (np.minimum(kept.counts_of(m, layout).sum(axis=1), first.of(m)) for m in MEDIA)
        return Budget(video, audio, first.exact)

    def check_cut(self, twin: Compressor, layout: TokenLayout) -> None:
        """Refuse a total that one modality cannot meet beside what the other keeps.

        Args:
            twin: this method at the ratios behind the cut.
            layout: of the batch.
        """
        modality, asked = self._solved, asked_budget(twin.settings, layout, self.audio_intact)
        if modality is None:
            return
        kept, most, rest = asked.of(modality), layout.counts(modality), asked.total - asked.of(modality)
        outside = (kept < np.minimum(most, 1)) | (kept > most)
        if outside.any():
            sample = int(np.argmax(outside))
            media = int(layout.counts(*MEDIA)[sample])
            low, high = (self.mean((rest[sample] + n) / media) for n in (min(1, most[sample]), most[sample]))
            raise UnreachableRatioError(
                f"{self.name}: behind layer {self._full_layers()} sample {layout.name_of(sample)} would keep "
                f"{kept[sample]} of its {most[sample]} {modality.name.lower()} tokens beside {rest[sample]} of the "
                f"other modality; reachable are {low:.4f} to {high:.4f} (retained_ratio, a mean over {self.num_layers} "
                "layers)"
            )


@register("fastv")
class FastV(FastvOm):
    """See the module's docstring; settings in `FastvIntactSettings`."""

    settings: FastvIntactSettings
    settings_type = FastvIntactSettings
    audio_intact = True

    def order_of(self, modality: Modality, scores: Tensor, layout: TokenLayout) -> Tensor:
        """See `FastvOm.order_of`; published code drops audio at random."""
        chance = modality == Modality.AUDIO and self.settings.rounding == "official"
        return random_scores(layout, self.settings.seed) if chance else scores

    def shares_of(self, modality: Modality, layout: TokenLayout) -> np.ndarray:
        """See `Compressor.shares_of`."""
        if not self._published_total:
            return super().shares_of(modality, layout)
        return intact_shares(self.ratio_of(Modality.VIDEO), layout, PUBLISHED_VIDEO_FLOOR)[modality]

    def check_cut(self, twin: Compressor, layout: TokenLayout) -> None:
        """See `FastvOm.check_cut`; a published total is met as far as it goes."""
        if not self._published_total:
            super().check_cut(twin, layout)

    @property
    def _published_total(self) -> bool:
        """Whether the share of the video is solved as published."""
        return self.settings.rounding == "official" and set(self._ratios()) == {"retained_ratio"}
