"""Budgets that depend on content, on the device: shares of segments that meet an exact total."""

from __future__ import annotations

import torch
from torch import Tensor

from omnisieve.ops.topk import topk_mask


def water_fill(weights: Tensor, level: Tensor, low: Tensor, high: Tensor, total: Tensor) -> Tensor:
    """Shift all levels by one amount and clip them, so that their weighted sum is `total`.

    The sum is piecewise linear in the shift, with a kink where a segment leaves `low` and one where it reaches
    `high`; the shift is read off between the two kinks that enclose `total`.

    Args:
        weights: [B, G] float64, 0 for segments that are not there.
        level: [B, G] float64, what each segment would have.
        low, high: [B] float64.
        total: [B] float64, between the weighted sums of `low` and of `high`.

    Returns:
        [B, G] float64 within `low` and `high`.
    """
    low, high = low.unsqueeze(-1), high.unsqueeze(-1)
    kinks, order = torch.cat([low - level, high - level], dim=-1).sort(dim=-1, stable=True)
    slope = torch.cat([weights, -weights], dim=-1).gather(-1, order).cumsum(dim=-1)
    climbed = (slope[:, :-1] * kinks.diff(dim=-1)).cumsum(dim=-1)
    reached = torch.cat([torch.zeros_like(climbed[:, :1]), climbed], dim=-1) + low * weights.sum(-1, keepdim=True)
    at = torch.searchsorted(reached, total.unsqueeze(-1)).clamp(1, kinks.shape[-1] - 1) - 1
    missing = total.unsqueeze(-1) - reached.gather(-1, at)
    steepness = slope.gather(-1, at)
    shift = kinks.gather(-1, at) + torch.where(steepness > 0, missing / steepness.clamp(min=1e-300), 0.0)
    return torch.minimum(torch.maximum(level + shift, low), high)


def round_to_total(targets: Tensor, sizes: Tensor, total: Tensor) -> Tensor:
    """Round real targets to integers with an exact sum, by largest remainder; ties go to the earlier segment.

    Args:
        targets: [B, G] float64, row sums equal to `total` up to rounding errors.
        sizes: [B, G] long, the most a segment can have.
        total: [B] long.

    Returns:
        [B, G] long.
    """
    whole = torch.minimum(targets.floor().long(), sizes)
    missing = total - whole.sum(dim=-1)
    return whole + topk_mask(targets - whole, whole < sizes, missing)
