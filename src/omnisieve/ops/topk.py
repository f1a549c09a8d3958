"""Segment-wise top-k with one rule for ties: higher score first, then the lower index.

Scores that agree to rounding count as ties. What a sample's neighbours in a batch are decides how its sums are rounded,
and must not decide between two identical tokens. Where scores are compared they are put into levels: neighbours in the
order whose difference is rounding share one, and no level is wider than a few roundings, however densely scores lie.
Levels are found between the scores themselves, so that no fixed grid runs between two that are alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 2.0**-21
"""Of a score relative to its size: a few units in the last place of single precision, whose sums round by as much."""
WIDEST = 4 * ROUNDING
"""How far the scores of one level lie apart, at most, relative to their size."""

Scale = float | Tensor | None
"""The size that the rounding of scores is relative to, or [..., 1]: a score's own where that is larger. 0 for what is a
product throughout (attention), the size of the terms for what is a difference (1 for 1 - cosine); None for scores that
are exact.
"""


def descending_rank(scores: Tensor, valid: Tensor, scale: Scale = 0.0) -> Tensor:
    """Rank of every entry along the last dimension, 0 for the largest; padding ranks last.

    Args:
        scores: [..., L].
        valid: [..., L] bool.
        scale: see `Scale`; whole numbers are exact anyway.

    Returns:
        [..., L] long. Ties are ordered by index, on every device alike (stable sort).
    """
    order = levels(scores, valid, scale).argsort(dim=-1, stable=True)
    return torch.empty_like(order).scatter_(-1, order, _ramp(order))


def levels(scores: Tensor, valid: Tensor, scale: Scale = 0.0) -> Tensor:
    """Number of each entry's level, [..., L] long from 0 for the largest; padding has L. See `descending_rank`."""
    scores = scores.detach()
    lowest = -torch.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).min
    ordered, order = scores.masked_fill(~valid, lowest).sort(dim=-1, descending=True)
    level = new_levels(ordered, scale).cumsum(dim=-1) - 1
    return torch.empty_like(order).scatter_(-1, order, level).masked_fill(~valid, scores.shape[-1])


def settled(scores: Tensor, valid: Tensor, scale: Scale = 0.0) -> Tensor:
    """Scores of which those of a level are equal, to be computed with further; padding is -inf. See `levels`."""
    level = levels(scores, valid, scale)
    largest = scores.new_full((*scores.shape[:-1], scores.shape[-1] + 1), -torch.inf)
    return largest.scatter_reduce(-1, level, scores.masked_fill(~valid, -torch.inf), "amax").gather(-1, level)


def new_levels(ordered: Tensor, scale: Scale = 0.0, apart: Tensor | None = None) -> Tensor:
    """Where sorted values begin a new level, [..., L] bool.

    Args:
        ordered: [..., L], rising or falling.
        scale: see `Scale`.
        apart: [..., L] bool, entries that share no level with the one before in any case.
    """
    place = _ramp(ordered)
    anew = place == 0 if apart is None else (place == 0) | apart
    begins = (ordered != ordered.roll(1, dims=-1)) | anew
    if scale is None or not ordered.is_floating_point():
        return begins
    # Infinite scores are levels of their own.
    limit = torch.finfo(torch.float32).max
    values = (ordered if ordered.dtype == torch.float64 else ordered.float()).clamp(-limit, limit)
    size = values.abs()
    size = torch.maximum(size, scale.to(size.dtype)) if isinstance(scale, Tensor) else size.clamp(min=scale)
    near = (values - values.roll(1, dims=-1)).abs() <= ROUNDING * torch.minimum(size, size.roll(1, dims=-1))
    begins = (begins & ~near) | anew
    head = torch.where(begins, place, 0).cummax(dim=-1).values
    width = WIDEST * size.gather(-1, head).clamp(min=torch.finfo(torch.float32).tiny)
    part = ((values - values.gather(-1, head)).abs() / width).floor()
    return begins | (part != part.roll(1, dims=-1))


def first_largest(cosines: Tensor) -> Tensor:
    """Index of the first entry that is the largest to rounding, [..., 1] long, of cosines [..., L]."""
    largest = cosines.amax(dim=-1, keepdim=True)
    return (cosines >= largest - ROUNDING).to(torch.uint8).argmax(dim=-1, keepdim=True)


def topk_mask(scores: Tensor, valid: Tensor, counts: Tensor, scale: Scale = 0.0) -> Tensor:
    """The `counts` largest entries of each segment.

    Args:
        scores: [..., L].
        valid: [..., L] bool.
        counts: [...] long, how many to keep; more than a segment has keeps all of it.
        scale: see `Scale`.

    Returns:
        [..., L] bool, always within `valid`.
    """
    return (descending_rank(scores, valid, scale) < counts.unsqueeze(-1)) & valid


def tiered(tier: Tensor, scores: Tensor, valid: Tensor, scale: Scale = 0.0) -> Tensor:
    """Scores that order entries by tier, and within a tier as `scores` do.

    Args:
        tier: [..., L] whole numbers; the highest comes first.
        scores: [..., L].
        valid: [..., L] bool.
        scale: see `Scale`.

    Returns:
        [..., L] float32, no two valid entries alike.
    """
    return (tier.long() * scores.shape[-1] - descending_rank(scores, valid, scale)).float()


def _ramp(like: Tensor) -> Tensor:
    return torch.arange(like.shape[-1], device=like.device).expand_as(like)
