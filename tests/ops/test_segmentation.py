"""Cuts from left to right."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from omnisieve.ops.segmentation import greedy_cuts


def walk(change: list[bool], least: int) -> list[bool]:
    """The definition, entry by entry."""
    last, starts = 0, [True]
    for place in range(1, len(change)):
        starts.append(change[place] and place - last >= least)
        last = place if starts[-1] else last
    return starts


@given(st.lists(st.lists(st.booleans(), min_size=17, max_size=17), min_size=1, max_size=3), st.integers(1, 20))
def test_cuts_are_those_of_a_walk_from_left_to_right(change: list[list[bool]], least: int) -> None:
    starts = greedy_cuts(torch.tensor(change), least)
    assert starts.tolist() == [walk(row, least) for row in change]


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 7), st.integers(0, 9))
def test_entries_behind_change_nothing(change: list[bool], least: int, padding: int) -> None:
    padded = greedy_cuts(torch.tensor([change + [False] * padding]), least)
    assert torch.equal(padded[:, : len(change)], greedy_cuts(torch.tensor([change]), least))
