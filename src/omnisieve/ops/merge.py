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
        candidates: [..., L] bool.
        sizes: [...] on the host, number of candidates.
        counts: [...] on the host.

    Returns:
        [..., L] bool.
    """
    step = np.maximum(sizes // np.maximum(counts, 1), 1)
    step_, counts_ = (
        torch.from_numpy(a).to(candidates.device, non_blocking=True).unsqueeze(-1) for a in (step, counts)
    )
    ordinal = candidates.long().cumsum(dim=-1) - 1
    return candidates & (ordinal % step_ == 0) & (ordinal // step_ < counts_)


def nearest_anchor(x: Tensor, anchors: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The anchor of largest cosine to every entry.

    Args:
        x: [..., L, D].
        anchors: [..., L] bool.
        most: anchors of the segment that has most, known on the host; at least 1.

    Returns:
        slot [..., most] long, places of the anchors; choice [..., L] long, which of them is nearest; its cosine
        [..., L], -inf where there is no anchor.
    """
    slot = (~anchors).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
    directions = unit(x)
    rows = directions.gather(-2, slot.unsqueeze(-1).expand(*slot.shape, directions.shape[-1]))
    absent = ~anchors.gather(-1, slot).unsqueeze(-2)
    cosines, choice = (directions @ rows.transpose(-1, -2)).masked_fill(absent, -torch.inf).max(dim=-1)
    return slot, choice, cosines


def spread_over_anchors(x: Tensor, anchors: Tensor, pool: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Assign every pool entry to its nearest anchor; an anchor's entries share a weight of 1.

    Args:
        x: [..., L, D], what is compared.
        anchors: [..., L] bool.
        pool: [..., L] bool.
        most: see `nearest_anchor`.

    Returns:
        target [..., L] long, place of the anchor, and weight [..., L], 0 for what has none. An anchor plus the
        weighted sum of its entries is VisionZip's contextual token.
    """
    slot, choice, cosines = nearest_anchor(x, anchors, most)
    member = (pool & cosines.isfinite()).to(cosines.dtype)
    members = torch.zeros_like(slot, dtype=member.dtype).scatter_add(-1, choice, member)
    return slot.gather(-1, choice), member / members.gather(-1, choice).clamp(min=1)


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
    slot, choice, nearest = nearest_anchor(embeds, anchors, most)
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
