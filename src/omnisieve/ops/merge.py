"""Merging dropped tokens into kept ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from omnisieve.ops.clustering import best_of_group
from omnisieve.ops.similarity import unit
from omnisieve.ops.topk import ROUNDING, first_largest


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
    cosines = (directions @ rows.transpose(-1, -2)).masked_fill(absent, -torch.inf)
    return slot, first_largest(cosines).squeeze(-1), cosines.amax(dim=-1)


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
    merged = best_of_group(score, torch.where(pool, choice, most), most, group, scale=1.0)

    # Scores are cosines: the exponential needs no shift.
    weight = torch.where(merged, score.exp(), 0.0)
    mass = torch.zeros_like(weight[:, :most]).scatter_add(-1, choice, weight)
    weight = 0.5 * weight / mass.gather(-1, choice).clamp(min=1e-30)
    own = torch.ones_like(weight).scatter(-1, slot, torch.where(mass > 0, 0.5, 1.0).to(weight.dtype))
    source = (~merged).to(torch.uint8).argsort(dim=-1, stable=True)[:, : max(most * group, 1)]
    return source, slot.gather(1, choice.gather(1, source)), weight.gather(1, source), own


def merge_into_targets(
    x: Tensor,
    pool: Tensor,
    targets: Tensor,
    scene: Tensor,
    turn: Tensor,
    *,
    most: int,
    turns: int,
    least_own: float,
    themselves: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In every turn a pool token joins the most similar target of its scene; a target averages itself with the mean.

    Args:
        x: [B, N, D].
        pool: [B, N] bool, tokens that may be merged.
        targets: [B, N] bool.
        scene: [B, N] long; a token joins targets of its own scene only.
        turn: [B, N] long, turn in which a target is joined.
        most: targets of the sample that has most, known on the host; at least 1.
        turns: number of turns.
        least_own: what a target keeps of itself, at least; it keeps 1 / (members + 1) if that is more.
        themselves: whether targets may join targets of their own turn, themselves among them.

    Returns:
        source, target [B, N * turns] long, weight [B, N * turns] and own [B, N], as a plan's merge takes them.
    """
    slot = (~targets).to(torch.uint8).argsort(dim=-1, stable=True)[:, :most]
    there, its_scene, its_turn = (values.gather(1, slot).unsqueeze(1) for values in (targets, scene, turn))
    directions = unit(x)
    rows = directions.gather(1, slot.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    possible = pool.unsqueeze(-1) & there & (scene.unsqueeze(-1) == its_scene)
    if not themselves:
        possible = possible & ~(targets.unsqueeze(-1) & (turn.unsqueeze(-1) == its_turn))
    cosines = (directions @ rows.transpose(-1, -2)).masked_fill(~possible, -torch.inf)

    # Maxima by scattering are slow where many values meet; the frequent case needs none.
    nearest, choice = (
        (cosines.amax(dim=-1, keepdim=True), first_largest(cosines))
        if turns == 1
        else _max_per_group(cosines, its_turn, turns)
    )
    choice, joins = choice.flatten(1), nearest.isfinite().flatten(1)
    members = torch.zeros_like(cosines[:, 0]).scatter_add(-1, choice, joins.to(cosines.dtype))
    kept = (1 / (members + 1)).clamp(min=least_own)
    weight = torch.where(joins, ((1 - kept) / members.clamp(min=1)).gather(1, choice), 0.0)
    own = torch.ones_like(weight[:, : x.shape[1]]).scatter(1, slot, torch.where(there[:, 0], kept, 1.0))
    source = torch.arange(x.shape[1], device=x.device).repeat_interleave(turns).expand_as(choice)
    return source, slot.gather(1, choice), weight, own


def _max_per_group(values: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Largest value of each group of columns and the first column that has it to rounding.

    Args:
        values: [B, N, C].
        group: [B, 1, C] long, below `groups`.
        groups: number of groups.

    Returns:
        [B, N, groups] each; -inf for a group without columns.
    """
    group, shape = group.expand_as(values), (*values.shape[:2], groups)
    largest = values.new_full(shape, -torch.inf).scatter_reduce(-1, group, values, "amax")
    last, place = values.shape[-1] - 1, torch.arange(values.shape[-1], device=values.device)
    column = torch.where(values >= largest.gather(-1, group) - ROUNDING, place, last)
    return largest, torch.full(shape, last, device=values.device).scatter_reduce(-1, group, column, "amin")
