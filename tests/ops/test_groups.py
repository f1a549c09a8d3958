"""Sums, ranks and shares within groups, against plain loops."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from omnisieve.ops.groups import group_sum, rank_in_group, share_in_turns

MEMBERS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(-2, 2)), min_size=1, max_size=12)
GROUPS = 3  # the fourth is none


def columns(members: list[tuple[int, int, int]]) -> list[torch.Tensor]:
    """group, value and key, [2, N] each; the second row is the first backwards."""
    forward = torch.tensor(members).T
    return [torch.stack([column, column.flip(0)]) for column in forward]


@given(MEMBERS)
def test_sums_and_ranks(members: list[tuple[int, int, int]]) -> None:
    group, value, key = columns(members)
    total, rank = group_sum(value, group, GROUPS), rank_in_group(key, group, GROUPS)
    for row in range(2):
        for i, g in enumerate(group[row].tolist()):
            mine = [j for j in range(len(members)) if group[row, j] == g]
            assert total[row, i] == sum(int(value[row, j]) for j in mine)
            assert rank[row, i] == sorted(mine, key=lambda j: int(key[row, j])).index(i)


@given(MEMBERS, st.integers(0, 12))
def test_turns_are_taken_while_there_is_room(members: list[tuple[int, int, int]], total: int) -> None:
    group, room, key = columns(members)
    shares = share_in_turns(torch.full_like(room, total), room, key, group, GROUPS, most=5)
    for row in range(2):
        expected, left = [0] * len(members), [total] * GROUPS + [0]
        for _ in range(5):
            for i in sorted(range(len(members)), key=lambda j: int(key[row, j])):
                g = int(group[row, i])
                if left[g] and expected[i] < room[row, i]:
                    expected[i], left[g] = expected[i] + 1, left[g] - 1
        assert shares[row].tolist() == expected
