"""Budgets that depend on content, on the device: shares of segments that meet an exact total."""

from __future__ import annotations

import torch
from torch import Tensor

from omnisieve.ops.budget import GUARD
from omnisieve.ops.topk import topk_mask


def water_fill(weights: Tensor, level: Tensor, low: Tensor, high: Tensor, total: Tensor) -> Tensor:
    """Shift all levels by one amount and clip them, so that their weighted sum is `total`.

    The sum is piecewise linear in the shift, with a kink where a segment leaves `low` and one where it reaches
    `high`; the shift is read off between the two kinks that enclose `total`.

    Args:
        weights: [B, G] float64, 0 for segments that are not there.
        level: [B, G] float64, what each segment would have.
        low, high: [B, G] or [B, 1] float64.
        total: [B] float64, between the weighted sums of `low` and of `high`.

    Returns:
        [B, G] float64 within `low` and `high`.
    """
    kinks, order = torch.cat([low - level, high - level], dim=-1).sort(dim=-1, stable=True)
    slope = torch.cat([weights, -weights], dim=-1).gather(-1, order).cumsum(dim=-1)
    climbed = (slope[:, :-1] * kinks.diff(dim=-1)).cumsum(dim=-1)
    reached = torch.cat([torch.zeros_like(climbed[:, :1]), climbed], dim=-1) + (low * weights).sum(-1, keepdim=True)
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
    whole = torch.minimum((targets + GUARD).floor().long(), sizes)
    missing = total - whole.sum(dim=-1)
    # Targets carry rounding errors that differ from batch to batch; they must not decide between equal remainders.
    return whole + topk_mask(((targets - whole) / GUARD).round().long(), whole < sizes, missing)


def round_half_even(values: Tensor) -> Tensor:
    """Rounded to long, halves to even, where rounding errors of `values` [...] float64 do not decide what is a half."""
    nearest_half = (values * 2).round() / 2
    return torch.where((values - nearest_half).abs() < GUARD, nearest_half, values).round().long()


def share_out(shares: Tensor, low: Tensor, high: Tensor, total: Tensor) -> Tensor:
    """Integers in proportion to `shares`, within bounds and with an exact sum.

    Args:
        shares: [B, G], at least 0.
        low, high: [B, G] long.
        total: [B] long, between the sums of `low` and of `high`.

    Returns:
        [B, G] long: one common factor times `shares`, clipped to the bounds and rounded by largest remainder.
    """
    # A share of nothing would need an endless factor.
    weights = shares.double() / shares.amax(dim=-1, keepdim=True).double().clamp(min=1e-30)
    weights = weights.clamp(min=1e-3)
    factor = water_fill(weights, torch.zeros_like(weights), low / weights, high / weights, total.double())
    return round_to_total(weights * factor, high, total)


def level_out(counts: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """Repair integer counts to a sum one by one, all steps at once.

    While there are too many, the largest count above 1 gives one away; while there are too few, the smallest count
    below `most` takes one. Of equal counts the first goes first.

    Args:
        counts: [B, G] long, at most `most`.
        most: [B, G] long.
        total: [B] long; what the counts cannot reach is approached.

    Returns:
        [B, G] long.
    """
    fewer = total.unsqueeze(-1) < counts.sum(dim=-1, keepdim=True)
    low = torch.where(fewer, counts.clamp(max=1), counts)
    high = torch.where(fewer, counts, most)
    total = torch.minimum(torch.maximum(total, low.sum(dim=-1)), high.sum(dim=-1))
    ones = torch.ones_like(counts, dtype=torch.float64)
    level = water_fill(ones, torch.zeros_like(ones), low.double(), high.double(), total.double())
    # All end at the level; what the level has behind the point is left with those that gave last or took first.
    whole = (level + 1e-9).floor()
    place = torch.arange(counts.shape[-1], device=counts.device)
    rest = topk_mask(torch.where(fewer, place, -place), level - whole > 1e-9, total - whole.sum(dim=-1).long())
    return whole.long() + rest
