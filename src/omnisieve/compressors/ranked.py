"""A decision split in two: how many tokens of each segment stay, and the order they are taken in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from omnisieve.layout import Segments
from omnisieve.ops.topk import Scale, descending_rank, topk_mask


@dataclass(frozen=True)
class Ranked:
    """The tokens of one modality.

    Attributes:
        segments: what they compete in; every token of the modality is in one.
        counts: [B, G] long on the device, how many of each segment stay.
        scores: [B, S], compared within a segment: the highest stay; of equal ones the earlier. All tokens have one
            that means something, also those that do not stay.
        scale: size that the rounding of the scores is relative to, see `ops.topk.Scale`; of scores that are equal to
            rounding the earlier come first.
    """

    segments: Segments
    counts: Tensor
    scores: Tensor
    scale: Scale = 0.0

    def keep(self) -> Tensor:
        """What stays, [B, S] bool."""
        chosen = topk_mask(self.segments.gather(self.scores), self.segments.valid, self.counts, self.scale)
        return self.segments.scatter(chosen, False)

    def even_scores(self) -> Tensor:
        """The same order in evenly spaced scores, [B, S] float32; 0 outside the modality.

        In every segment they have mean 0 and about unit variance (at most 3 ** 0.5 from 0), and no two are equal.
        """
        rank = descending_rank(self.segments.gather(self.scores), self.segments.valid, self.scale)
        size = self.segments.valid.sum(dim=-1, keepdim=True).clamp(min=1)
        return self.segments.scatter(12**0.5 * (0.5 - (rank + 0.5) / size), 0.0)
