"""Merging dropped tokens into evenly spaced anchors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from omnisieve.ops.clustering import best_of_group
from omnisieve.ops.similarity import unit


def spaced_anchors(candidates: Tensor, sizes: np.ndarray, counts: np.ndarray) -> Tensor:
    """Every n-th candidate from the first on, n = max(1, size // count), until there are `counts`.

    Args:
        candidates: [B, S] bool.
        sizes: [B] on the host, number of candidates.
        counts: [B] on the host.

    Returns:
        [B, S] bool.
    """
    step = np.maximum(sizes // np.maximum(counts, 1), 1)
    step_, counts_ = (
        torch.from_numpy(a).to(candidates.device, non_blocking=True).unsqueeze(-1) for a in (step, counts)
    )
    ordinal = candidates.long().cumsum(dim=-1) - 1
    return candidates & (ordinal % step_ == 0) & (ordinal // step_ < counts_)


def merge_into_anchors(
    embeds: Tensor, anchors: Tensor, pool: Tensor, likeness: Tensor, most: int, group: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assign pool tokens to their nearest anchor; each anchor averages itself with the best of its tokens.

    Args:
        embeds: [B, S, D].
        anchors: [B, S] bool.
        pool: [B, S] bool, tokens that may be merged.
        likeness: [B, S], which tokens of an anchor are merged and, through a softmax, with what weight; where it is
            -inf the cosine to the anchor takes its place.
        most: anchors of the sample that has most, known on the host; at least 1.
        group: tokens merged into an anchor, at most.

    Returns:
        source, target [B, M] long, weight [B, M] and own [B, S], as a plan's merge takes them. An anchor with members
        becomes half itself, half their weighted mean.
    """
    slot = (~anchors).to(torch.uint8).argsort(dim=-1, stable=True)[:, :most]
    directions = unit(embeds)
    rows = directions.gather(1, slot.unsqueeze(-1).expand(-1, -1, directions.shape[-1]))
    cosines = (directions @ rows.transpose(-1, -2)).masked_fill(~anchors.gather(1, slot).unsqueeze(1), -torch.inf)
    nearest, choice = cosines.max(dim=-1)
    pool = pool & nearest.isfinite()
    score = torch.where(likeness.isinf(), nearest, likeness)
    merged = best_of_group(score, torch.where(pool, choice, most), most, group)

    # Scores are cosines: the exponential needs no shift.
    weight = torch.where(merged, score.exp(), 0.0)
    mass = torch.zeros_like(weight[:, :most]).scatter_add(-1, choice, weight)
    weight = 0.5 * weight / mass.gather(-1, choice).clamp(min=1e-30)
    own = torch.ones_like(weight).scatter(-1, slot, torch.where(mass > 0, 0.5, 1.0).to(weight.dtype))
    source = (~merged).to(torch.uint8).argsort(dim=-1, stable=True)[:, : max(most * group, 1)]
    return source, slot.gather(1, choice.gather(1, source)), weight.gather(1, source), own
