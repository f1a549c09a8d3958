"""Cutting sequences where their content changes."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy_cuts(change: Tensor, least: int) -> Tensor:
    """First entries of the segments that come of cutting from left to right.

    The walk is done in jumps from cut to cut, so it takes as many steps as there can be cuts, whatever the content.

    Args:
        change: [..., L] bool, entries that a segment may begin with.
        least: entries between two cuts, at least; the last segment may be shorter.

    Returns:
        [..., L] bool; the first entry is always one.
    """
    length = change.shape[-1]
    place = torch.arange(length, device=change.device)
    # The nearest entry from here on that a segment may begin with; `length` if there is none.
    following = torch.where(change, place, length).flip(-1).cummin(dim=-1).values.flip(-1)
    following = torch.nn.functional.pad(following, (0, 1), value=length)
    cut = torch.zeros_like(following[..., :1])
    starts = torch.zeros_like(following, dtype=torch.bool).scatter(-1, cut, True)
    for _ in range((length - 1) // least):
        cut = following.gather(-1, (cut + least).clamp(max=length))
        starts = starts.scatter(-1, cut, True)
    return starts[..., :length]
