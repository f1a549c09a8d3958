"""Segment-wise top-k with one rule for ties: higher score first, then the lower index."""

from __future__ import annotations

import torch
from torch import Tensor


def descending_rank(scores: Tensor, valid: Tensor) -> Tensor:
    """Rank of every entry along the last dimension, 0 for the largest; padding ranks last.

    Args:
        scores: [..., L].
        valid: [..., L] bool.

    Returns:
        [..., L] long. Ties are ordered by index, on every device alike (stable sort).
    """
    order = scores.detach().masked_fill(~valid, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    # Valid entries may be -inf themselves: a second stable pass moves the padding behind them.
    order = order.gather(-1, (~valid).gather(-1, order).to(torch.uint8).argsort(dim=-1, stable=True))
    return torch.empty_like(order).scatter_(-1, order, _ramp(order))


def topk_mask(scores: Tensor, valid: Tensor, counts: Tensor) -> Tensor:
    """The `counts` largest entries of each segment.

    Args:
        scores: [..., L].
        valid: [..., L] bool.
        counts: [...] long, how many to keep; more than a segment has keeps all of it.

    Returns:
        [..., L] bool, always within `valid`.
    """
    return (descending_rank(scores, valid) < counts.unsqueeze(-1)) & valid


def tiered(tier: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """Scores that order entries by tier, and within a tier as `scores` do.

    Args:
        tier: [..., L] whole numbers; the highest comes first.
        scores: [..., L].
        valid: [..., L] bool.

    Returns:
        [..., L] float32, no two valid entries alike.
    """
    return (tier.long() * scores.shape[-1] - descending_rank(scores, valid)).float()


def _ramp(like: Tensor) -> Tensor:
    return torch.arange(like.shape[-1], device=like.device).expand_as(like)
