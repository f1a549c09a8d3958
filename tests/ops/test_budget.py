"""Integer budgets: exact, within sizes, monotone, free of binary fractions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisieve.ops.budget import floor_product, largest_remainder, round_count
from omnisieve.ops.waterfill import level_out, round_to_total, share_out, water_fill

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
    bounds = torch.tensor([[low]], dtype=torch.float64), torch.tensor([[high]], dtype=torch.float64)
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
    bounds = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    level = torch.tensor([[value for _, value in frames]], dtype=torch.float64)
    targets = water_fill(sizes.double(), level, *bounds, total.double()) * sizes
    counts = round_to_total(targets, sizes, total)
    assert torch.equal(counts.sum(-1), total)
    assert ((counts >= 0) & (counts <= sizes)).all()
    assert ((counts - targets).abs() < 1 + 1e-6).all()


def test_rounding_errors_do_not_decide_between_equal_remainders() -> None:
    """0.7 of frames of three sizes, with the errors that sums of other lengths leave."""
    sizes = torch.tensor([[25, 25, 30, 30, 35, 35]])
    for error in (-1e-13, 0.0, 1e-13):
        targets = sizes * 0.7 + error * torch.tensor([1, 1, 0, 0, -1, -1], dtype=torch.float64)
        assert round_to_total(targets, sizes, torch.tensor([126])).tolist() == [[18, 18, 21, 21, 24, 24]]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=9), st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_level_out_is_the_loop_that_moves_one_token_at_a_time(windows: list[tuple[int, int]], at: float) -> None:
    most = [max(window) for window in windows]
    counts = [min(window) for window in windows]
    total = int(at * (sum(most) + 2))
    expected = list(counts)
    while sum(expected) > total and max(expected) > 1:
        expected[expected.index(max(expected))] -= 1
    while sum(expected) < total and expected != most:
        smallest = min(c for c, m in zip(expected, most, strict=True) if c < m)
        at_it = (i for i, (c, m) in enumerate(zip(expected, most, strict=True)) if c == smallest and c < m)
        expected[next(at_it)] += 1
    repaired = level_out(torch.tensor([counts]), torch.tensor([most]), torch.tensor([total]))
    assert repaired[0].tolist() == expected


@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 3), st.integers(0, 300)).map(lambda t: (t[0], t[1], t[1] + t[2])),
        min_size=1,
        max_size=12,
    ),
    st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_share_out_is_exact_proportional_and_within_bounds(windows: list[tuple[float, int, int]], at: float) -> None:
    shares = torch.tensor([[window[0] for window in windows]], dtype=torch.float64)
    low, high = (torch.tensor([[window[i] for window in windows]]) for i in (1, 2))
    total = low.sum(-1) + ((high - low).sum(-1) * at).long()
    counts = share_out(shares, low, high, total)
    assert torch.equal(counts.sum(-1), total)
    assert ((counts >= low) & (counts <= high)).all()
    inside = (counts > low + 1) & (counts < high - 1) & (shares > 2e-3 * shares.max())
    if inside.any():
        # One factor for all whom no bound holds.
        assert ((counts - 1) / shares)[inside].max() <= ((counts + 1) / shares)[inside].min()


def test_share_out_gives_to_a_segment_without_share_only_what_the_others_cannot_take() -> None:
    shares, low, high = torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 0]]), torch.tensor([[10, 10]])
    assert share_out(shares, low, high, torch.tensor([10]))[0].tolist() == [10, 0]
    assert share_out(shares, low, high, torch.tensor([14]))[0].tolist() == [10, 4]
