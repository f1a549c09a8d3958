"""How gradients reach the scores of a learned compressor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omnisieve.backbones.adapter import BackboneError


@dataclass(frozen=True)
class Estimator:
    """A gradient route and its settings.

    Attributes:
        route: "hard_drop" removes dropped tokens, so only kept ones are taught; "masked" leaves candidates in the
            sequence as keys whose gate is 0. The forward value is the same.
        candidates: with "masked", the share of dropped tokens that stays, in (0, 1].
    """

    route: Literal["hard_drop", "masked"] = "hard_drop"
    candidates: float = 1.0

    def __post_init__(self) -> None:
        if self.route not in ("hard_drop", "masked"):
            raise BackboneError(f"estimator route is {self.route!r}; choose 'hard_drop' or 'masked'")
        if not 0 < self.candidates <= 1:
            raise BackboneError(f"estimator candidates is {self.candidates}; it is a share and must lie in (0, 1]")
