"""Integer budgets: exact, within sizes, monotone, free of binary fractions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisieve.ops.budget import floor_product, largest_remainder, round_count
from omnisieve.ops.waterfill import round_to_total, water_fill

sizes_and_share = st.tuples(st.lists(st.integers(0, 60), min_size=1, max_size=9), st.floats(0, 1))


@given(sizes_and_share)
@settings(max_examples=200, deadline=None)
def test_largest_remainder_is_exact_and_fair(case: tuple[list[int], float]) -> None:
    sizes, share = np.array([case[0]]), case[1]
    total = np.array([int(share * sizes.sum())])
    parts = largest_remainder(total, sizes)
    assert parts.sum() == total
    assert (parts >= 0).all()
    assert (parts <= sizes).all()
    ideal = total[0] * sizes / max(sizes.sum(), 1)
    assert (np.abs(parts - ideal) < 1).all()


def test_of_equal_remainders_the_earlier_wins() -> None:
    np.testing.assert_array_equal(largest_remainder(np.array([5]), np.array([[4, 4, 4, 4]])), [[2, 1, 1, 1]])


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot keep \[5\] of \[4\]"):
        largest_remainder(np.array([5]), np.array([[4]]))


@pytest.mark.parametrize(("value", "expected"), [(45.5, 46), (44.5, 44), (50 * 0.65 * 1.4, 46), (0.5, 0), (1.4, 1)])
def test_rounding_is_half_to_even_of_what_is_meant(value: float, expected: int) -> None:
    assert round_count(value) == expected


@pytest.mark.parametrize(("count", "fraction", "expected"), [(50, 0.58, 28), (144, 0.3, 43), (10, 0.5, 5)])
def test_floors_are_those_of_published_code(count: int, fraction: float, expected: int) -> None:
    assert floor_product(np.array(count), fraction) == expected == int(count * fraction)


@given(
    st.lists(st.tuples(st.integers(0, 300), st.floats(0, 1)), min_size=1, max_size=12),
    st.floats(0, 0.5),
    st.floats(0.5, 1),
    st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_water_fill_meets_the_total_within_bounds(
    windows: list[tuple[int, float]], low: float, high: float, at: float
) -> None:
    weights, level = torch.tensor(windows, dtype=torch.float64).T[:, None]
    bounds = torch.tensor([low], dtype=torch.float64), torch.tensor([high], dtype=torch.float64)
    total = weights.sum(-1) * (low + at * (high - low))
    share = water_fill(weights, level, *bounds, total)
    assert ((share >= low) & (share <= high)).all()
    torch.testing.assert_close((share * weights).sum(-1), total, rtol=1e-9, atol=1e-6)
    inside = (share > low + 1e-9) & (share < high - 1e-9)
    # Whoever is not at a bound was moved by the same amount.
    moved = (share - level)[inside]
    assert not len(moved) or moved.max() - moved.min() < 1e-6


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=12), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_round_to_total_is_exact(frames: list[tuple[int, float]], share: float) -> None:
    sizes = torch.tensor([[size for size, _ in frames]])
    total = (sizes.sum(-1) * share).long()
    bounds = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    level = torch.tensor([[value for _, value in frames]], dtype=torch.float64)
    targets = water_fill(sizes.double(), level, *bounds, total.double()) * sizes
    counts = round_to_total(targets, sizes, total)
    assert torch.equal(counts.sum(-1), total)
    assert ((counts >= 0) & (counts <= sizes)).all()
    assert ((counts - targets).abs() < 1 + 1e-6).all()
