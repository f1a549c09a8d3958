"""Integer budgets, on the host: how many tokens stay, before any score exists."""

from __future__ import annotations

import numpy as np

# Products such as 0.65 * 50 * 1.4 fall a few ulps short of the half or the integer that they mean.
GUARD = 1e-9


def round_count(value: np.ndarray | float) -> np.ndarray:
    """Round half to even, with a guard against binary fractions: 45.4999999999 means 45.5."""
    scaled = np.asarray(value, dtype=np.float64)
    nearest_half = np.round(scaled * 2) / 2
    return np.round(np.where(np.abs(scaled - nearest_half) < GUARD, nearest_half, scaled)).astype(np.int64)


def floor_product(count: np.ndarray, fraction: np.ndarray | float) -> np.ndarray:
    """`int(count * fraction)` exactly as the published codes compute it, binary fractions included."""
    return np.floor(np.asarray(count, dtype=np.float64) * fraction).astype(np.int64)


def round_product(count: np.ndarray, fraction: np.ndarray | float) -> np.ndarray:
    """`round(count * fraction)` exactly as the published codes compute it, binary fractions included."""
    return np.rint(np.asarray(count, dtype=np.float64) * fraction).astype(np.int64)


def largest_remainder(total: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Split `total` over segments in proportion to their sizes (Hamilton's method).

    Args:
        total: [B] int, at most the sum of the sizes.
        sizes: [B, G] int.

    Returns:
        [B, G] int64, row sums equal to `total`, never above `sizes`. Of equal remainders the earlier segment wins.
    """
    whole = sizes.sum(axis=1)
    if (total > whole).any() or (total < 0).any():
        raise ValueError(f"cannot keep {total.tolist()} of {whole.tolist()} tokens")
    # Integer arithmetic: quotient and remainder of total * size / whole are exact.
    product = total[:, None] * sizes
    divisor = np.maximum(whole, 1)[:, None]
    quota, remainder = product // divisor, product % divisor
    order = np.argsort(-remainder, axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable")
    return quota + (rank < (total - quota.sum(axis=1))[:, None])


def round_to_sum(targets: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Round real numbers to integers with an exact sum, by largest remainder.

    Args:
        targets: [B, G], at least 0; row sums equal to `total` up to rounding errors.
        total: [B] int.

    Returns:
        [B, G] int64. Of equal remainders the earlier wins, so that falling targets stay falling.
    """
    whole = np.floor(targets + GUARD).astype(np.int64)
    order = np.argsort(whole - targets, axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable")
    return whole + (rank < (total - whole.sum(axis=1))[:, None])
