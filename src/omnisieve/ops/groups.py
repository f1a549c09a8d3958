"""Sums, ranks and shares within groups of a row, where the groups are known on the device only."""

from __future__ import annotations

import torch
from torch import Tensor

from omnisieve.ops.topk import Scale, new_levels


def group_sum(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sum over each entry's group, at every member.

    Args:
        values: [B, N] long or floating.
        group: [B, N] long; entries in no group have `groups` and see each other's sum.
        groups: number of groups.

    Returns:
        [B, N] in the dtype of `values`.
    """
    total = torch.zeros(values.shape[0], groups + 1, dtype=values.dtype, device=values.device)
    return total.scatter_add(-1, group, values).gather(-1, group)


def rank_in_group(key: Tensor, group: Tensor, groups: int, scale: Scale = 0.0) -> Tensor:
    """How many members of its group come before each entry, in ascending order of `key`; ties by position.

    Args:
        key: [B, N].
        group: [B, N] long; entries in no group have `groups`.
        groups: number of groups.
        scale: of the key's rounding, see `ops.topk`; whole numbers are exact.

    Returns:
        [B, N] long.
    """
    key = key.detach()
    by_key = key.argsort(dim=-1, stable=True)
    order = by_key.gather(-1, group.gather(-1, by_key).argsort(dim=-1, stable=True))
    if key.is_floating_point():
        own = group.gather(-1, order)
        level = new_levels(key.gather(-1, order), scale, apart=own != own.roll(1, dims=-1)).cumsum(dim=-1)
        order = torch.empty_like(order).scatter_(-1, order, level).argsort(dim=-1, stable=True)
    ramp = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    sizes = torch.zeros(group.shape[0], groups + 1, dtype=torch.long, device=group.device)
    sizes = sizes.scatter_add(-1, group, torch.ones_like(group))
    first = (sizes.cumsum(dim=-1) - sizes).gather(-1, group)
    return torch.empty_like(order).scatter_(-1, order, ramp) - first


def share_in_turns(total: Tensor, room: Tensor, key: Tensor, group: Tensor, groups: int, most: int) -> Tensor:
    """Hand out a group's total one by one, in turns, to the members that have room left.

    Args:
        total: [B, N] long, the group's total at every member.
        room: [B, N] long, the most that a member can take.
        key: [B, N] long, who comes first in a turn: the smallest.
        group: [B, N] long; entries in no group have `groups`.
        groups: number of groups.
        most: the largest of `room`, known on the host.

    Returns:
        [B, N] long; what exceeds the room of all members is not handed out.
    """
    batch, members = room.shape
    turn = torch.arange(most, device=room.device)
    place = rank_in_group(key, torch.zeros_like(group), 1).unsqueeze(-1)
    open_ = (turn < room.unsqueeze(-1)) & (group < groups).unsqueeze(-1)
    slots = torch.where(open_, group.unsqueeze(-1), groups).reshape(batch, -1)
    rank = rank_in_group((turn * members + place).reshape(batch, -1), slots, groups).reshape(open_.shape)
    return (open_ & (rank < total.unsqueeze(-1))).sum(dim=-1)
