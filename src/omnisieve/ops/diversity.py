"""Max-min diversity: greedy farthest-point selection inside padded segments (DivPrune, arXiv 2503.02175)."""

from __future__ import annotations

import torch
from torch import Tensor

from omnisieve.ops.similarity import symmetric, unit
from omnisieve.ops.topk import ROUNDING


def maxmin_order(x: Tensor, valid: Tensor, count: int, weight: Tensor | None = None) -> Tensor:
    """The first `count` picks of every segment, in order.

    The first pick is the entry farthest from its nearest neighbour; each next one is farthest, in cosine distance,
    from everything picked before. The distance to the picked ones is kept up to date, so a pick costs O(L).

    Args:
        x: [..., L, D].
        valid: [..., L] bool.
        count: picks per segment, the largest that any segment needs.
        weight: [..., L], at least 0: scales the distances of a candidate (winDivPrune of SEATS, section 4.1).

    Returns:
        [..., count] long, distinct up to the number of valid entries and meaningless after it. Of distances that are
        equal to rounding the lower index wins.
    """
    length = x.shape[-2]
    directions = unit(x)
    # Rounding leaves duplicates a little below 0, which a weight would blow up.
    distance = symmetric(1 - directions @ directions.transpose(-1, -2)).clamp(min=0)
    itself = torch.eye(length, dtype=torch.bool, device=x.device)
    others = distance.masked_fill(itself | ~valid.unsqueeze(-2), torch.inf)
    # What has no other is far from everything.
    nearest = others.amin(dim=-1).clamp(max=2)
    picks: list[Tensor] = []
    for _ in range(count):
        # A candidate's weight is common to all its distances, so scaling the nearest one is enough.
        gain = nearest if weight is None else nearest * weight
        gain = gain.masked_fill(~valid, -torch.inf)
        largest, at = gain.max(dim=-1, keepdim=True)
        # Of those that are the largest to rounding the first; a weight scales the rounding of the distances.
        rounding = ROUNDING if weight is None else ROUNDING * weight.gather(-1, at)
        pick = (gain >= largest - rounding).to(torch.uint8).argmax(dim=-1, keepdim=True)
        row = distance.gather(-2, pick.unsqueeze(-1).expand(*pick.shape, length)).squeeze(-2)
        # From the second pick on only distances to picked entries count.
        nearest = torch.minimum(nearest, row) if picks else row
        valid = valid.scatter(-1, pick, False)
        picks.append(pick)
    return torch.cat(picks, dim=-1) if picks else nearest.new_zeros((*nearest.shape[:-1], 0), dtype=torch.long)


def maxmin_rank(x: Tensor, valid: Tensor, weight: Tensor | None = None) -> Tensor:
    """When each entry is picked, if picking goes on until nothing is left: [..., L] long from 0, L for padding.

    Costs L picks, see `maxmin_order` for the arguments.
    """
    length = x.shape[-2]
    order = maxmin_order(x, valid, length, weight)
    # Picks past the end of a short segment repeat an index: the first counts.
    place = torch.arange(length, device=x.device).expand_as(order)
    rank = torch.full_like(order, length).scatter_reduce(-1, order, place, "amin")
    return rank.masked_fill(~valid, length)


def maxmin_mask(x: Tensor, valid: Tensor, counts: Tensor, most: int, weight: Tensor | None = None) -> Tensor:
    """The first `counts` picks of every segment as a mask.

    Args:
        x: [..., L, D].
        valid: [..., L] bool.
        counts: [...] long, at most the number of valid entries.
        most: the largest of `counts`, known on the host.
        weight: see `maxmin_order`.

    Returns:
        [..., L] bool.
    """
    order = maxmin_order(x, valid, most, weight)
    taken = torch.arange(most, device=x.device) < counts.unsqueeze(-1)
    # Adding, not setting: picks past the end of a short segment repeat an index.
    return torch.zeros_like(valid, dtype=torch.long).scatter_add(-1, order, taken.long()) > 0
