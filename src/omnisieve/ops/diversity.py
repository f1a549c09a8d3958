"""Max-min diversity: greedy farthest-point selection inside padded segments (DivPrune, arXiv 2503.02175)."""

from __future__ import annotations

import torch
from torch import Tensor

from omnisieve.ops.similarity import unit


def maxmin_order(x: Tensor, valid: Tensor, count: int) -> Tensor:
    """The first `count` picks of every segment, in order.

    The first pick is the entry farthest from its nearest neighbour; each next one is farthest, in cosine distance,
    from everything picked before. The distance to the picked ones is kept up to date, so a pick costs O(L).

    Args:
        x: [..., L, D].
        valid: [..., L] bool.
        count: picks per segment, the largest that any segment needs.

    Returns:
        [..., count] long, distinct up to the number of valid entries and meaningless after it. Of equal distances the
        lower index wins.
    """
    length = x.shape[-2]
    directions = unit(x)
    distance = 1 - directions @ directions.transpose(-1, -2)
    itself = torch.eye(length, dtype=torch.bool, device=x.device)
    others = distance.masked_fill(itself | ~valid.unsqueeze(-2), torch.inf)
    nearest = others.amin(dim=-1)
    picks: list[Tensor] = []
    for _ in range(count):
        pick = nearest.masked_fill(~valid, -torch.inf).argmax(dim=-1, keepdim=True)
        row = distance.gather(-2, pick.unsqueeze(-1).expand(*pick.shape, length)).squeeze(-2)
        # From the second pick on only distances to picked entries count.
        nearest = torch.minimum(nearest, row) if picks else row
        valid = valid.scatter(-1, pick, False)
        picks.append(pick)
    return torch.cat(picks, dim=-1) if picks else nearest.new_zeros((*nearest.shape[:-1], 0), dtype=torch.long)


def maxmin_mask(x: Tensor, valid: Tensor, counts: Tensor, most: int) -> Tensor:
    """The first `counts` picks of every segment as a mask.

    Args:
        x: [..., L, D].
        valid: [..., L] bool.
        counts: [...] long, at most the number of valid entries.
        most: the largest of `counts`, known on the host.

    Returns:
        [..., L] bool.
    """
    order = maxmin_order(x, valid, most)
    taken = torch.arange(most, device=x.device) < counts.unsqueeze(-1)
    # Adding, not setting: picks past the end of a short segment repeat an index.
    return torch.zeros_like(valid, dtype=torch.long).scatter_add(-1, order, taken.long()) > 0
