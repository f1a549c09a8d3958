"""How a compressor's scores are distributed: histograms that are counted on the device and summed over ranks.

Scores may have any scale. The buckets are equally wide in x / (1 + |x|), so every score has one, and those of scores
between 0 and 1 are less than 0.004 wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omnisieve.layout import MEDIA, TokenLayout
from omnisieve.training.distributed import Ranks

BUCKETS = 2048
QUANTILES = (5, 25, 50, 75, 95)
_PLACES = np.linspace(-1, 1, BUCKETS + 1)
_LARGEST = 1e6
EDGES = np.divide(_PLACES, 1 - np.abs(_PLACES), out=np.sign(_PLACES) * _LARGEST, where=np.abs(_PLACES) < 1)
"""Of the buckets, [BUCKETS + 1]; scores beyond the outermost are counted in the outermost buckets."""


@dataclass(frozen=True)
class Distribution:
    """Of the scores of one modality's tokens.

    Attributes:
        counts: [BUCKETS], tokens per bucket.
        total, squares: sums of scores and of their squares.
    """

    counts: np.ndarray
    total: float
    squares: float

    def summary(self) -> dict[str, float]:
        """Mean, standard deviation, and quantiles "p5" to "p95", which are exact to the width of a bucket."""
        number = self.counts.sum()
        mean = self.total / number
        below = np.concatenate([[0.0], np.cumsum(self.counts)]) / number
        found = {"mean": mean, "std": max(self.squares / number - mean**2, 0.0) ** 0.5}
        return found | {f"p{q}": float(np.interp(q / 100, below, EDGES)) for q in QUANTILES}


class ScoreMeter:
    """Adds up distributions of scores over micro-batches; on the device until `read`."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sums: dict[str, Tensor] = {}

    def add(self, scores: Tensor | None, layout: TokenLayout) -> None:
        """Count the scores [B, S] of a plan, if it has any; nothing waits for the device."""
        if scores is None:
            return
        for modality in MEDIA:
            name = modality.name.lower()
            sums = moments(scores.detach(), layout.mask(modality))
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def read(self) -> Mapping[str, Distribution]:
        """By modality, over all ranks since the last read; those without a token are left out. All ranks call this."""
        names, sums = list(self._sums), list(self._sums.values())
        self._sums = {}
        if not names:
            return {}
        whole = np.array(self._ranks.sum(torch.cat(sums).tolist())).reshape(len(names), -1)
        found = {name: Distribution(row[2:], row[0], row[1]) for name, row in zip(names, whole, strict=True)}
        return {name: values for name, values in found.items() if values.counts.any()}


def moments(scores: Tensor, member: Tensor) -> Tensor:
    """Sum, sum of squares and counts per bucket of some scores.

    Args:
        scores: [B, S].
        member: [B, S] bool, which ones.

    Returns:
        [2 + BUCKETS] float64, in which counts are exact.
    """
    values = scores.double().masked_fill(~member, 0)
    place = (0.5 * BUCKETS * (values / (1 + values.abs()) + 1)).long().clamp(0, BUCKETS - 1)
    counts = torch.zeros(BUCKETS, dtype=torch.float64, device=scores.device)
    counts = counts.index_add(0, place.flatten(), member.flatten().double())
    return torch.cat([values.sum().unsqueeze(0), values.square().sum().unsqueeze(0), counts])
