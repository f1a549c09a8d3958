"""Density-based saliency and assignment to anchors, over padded segments."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from omnisieve.ops.groups import rank_in_group
from omnisieve.ops.similarity import segment_mean, symmetric, unit
from omnisieve.ops.topk import ROUNDING, WIDEST, Scale, levels, topk_mask

Metric = Literal["cosine", "euclidean"]
KERNELS = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Variances of the Gaussian kernels that measure uniqueness (DASH)."""


def density_peaks(x: Tensor, valid: Tensor, neighbours: int, metric: Metric = "cosine") -> Tensor:
    """How much an entry is the centre of a cluster of its own (DPC-kNN).

    density = exp(-mean distance to the nearest neighbours), of squared distances if they are Euclidean; separation =
    distance to the nearest denser entry, or, for the densest, to the farthest entry.

    Args:
        x: [..., L, D].
        valid: [..., L] bool.
        neighbours: k; entries of a segment with fewer others use all of them.
        metric: of the distances.

    Returns:
        separation * density, [..., L], or its logarithm if distances are Euclidean, because densities of wide rows
        underflow; meaningless outside `valid`. The rounding of either is relative to `distance_scale`.
    """
    distance, others = _distances(x, valid, metric)
    sparsity = _nearest_mean(distance if metric == "cosine" else distance.square(), others, neighbours)
    scale = distance_scale(x, valid, metric)
    separation = _separation(distance, others, valid, sparsity, distance.masked_fill(~others, 0).amax(dim=-1), scale)
    return separation * torch.exp(-sparsity) if metric == "cosine" else separation.log() - sparsity


def distance_scale(x: Tensor, valid: Tensor, metric: Metric) -> Tensor:
    """What distances, or squares of Euclidean ones, are a difference of: 1, or the largest square of a segment's rows.

    Args:
        x: [..., L, D].
        valid: [..., L] bool.
        metric: of the distances.

    Returns:
        [..., 1] float32.
    """
    if metric == "cosine":
        return torch.ones_like(x[..., :1, 0], dtype=torch.float32)
    return x.float().square().sum(dim=-1).masked_fill(~valid, 0).amax(dim=-1, keepdim=True)


def density_peaks_with_itself(x: Tensor, valid: Tensor, neighbours: int) -> Tensor:
    """`density_peaks` in the form of FastVID (arXiv 2503.11187).

    Distances are Euclidean and divided by sqrt(D), an entry is the first of its own neighbours, and the densest entry
    is separated by the largest distance that there is in its segment. The rounding of the result, a logarithm, is
    relative to `distance_scale` divided by D.
    """
    distance, others = _distances(x, valid, "euclidean")
    distance = distance / x.shape[-1] ** 0.5
    scale = distance_scale(x, valid, "euclidean") / x.shape[-1]
    count = others.sum(dim=-1).clamp(max=neighbours - 1)
    sparsity = _nearest_mean(distance.square(), others, neighbours - 1) * count / (count + 1)
    farthest = distance.masked_fill(~others, 0).amax(dim=(-2, -1)).unsqueeze(-1)
    return _separation(distance, others, valid, sparsity, farthest, scale).log() - sparsity


def _separation(
    distance: Tensor, others: Tensor, valid: Tensor, sparsity: Tensor, farthest: Tensor, scale: Tensor
) -> Tensor:
    """Distance to the nearest denser entry, [..., L]; `farthest` separates the densest, all that are to rounding."""
    level = levels(sparsity, valid, scale)
    denser = others & (level.unsqueeze(-2) > level.unsqueeze(-1))
    nearest_denser = distance.masked_fill(~denser, torch.inf).amin(dim=-1)
    return torch.where(denser.any(dim=-1), nearest_denser, farthest).clamp(min=0)


def isolation(x: Tensor, valid: Tensor, neighbours: int) -> Tensor:
    """Mean cosine distance to the nearest neighbours, [..., L]; arguments as for `density_peaks`."""
    return _nearest_mean(*_distances(x, valid, "cosine"), neighbours)


def _distances(x: Tensor, valid: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Distances [..., L, L] and which of them join two different valid entries."""
    itself = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
    others = valid.unsqueeze(-1) & valid.unsqueeze(-2) & ~itself
    if metric == "euclidean":
        wide = x if x.dtype == torch.float64 else x.float()
        # One way of computing for every length: a segment is treated alike in every batch.
        distance = symmetric(torch.cdist(wide, wide, compute_mode="use_mm_for_euclid_dist"))
        # The square is a difference of squares of rows: of identical ones it leaves the rounding.
        least = WIDEST * distance_scale(x, valid, metric)
        return distance * (distance.square() > least.unsqueeze(-1)), others
    directions = unit(x)
    return symmetric(1 - directions @ directions.transpose(-1, -2)), others


def _nearest_mean(distance: Tensor, others: Tensor, neighbours: int) -> Tensor:
    nearest = distance.masked_fill(~others, torch.inf).topk(min(neighbours, distance.shape[-1]), largest=False).values
    present = nearest.isfinite()
    return nearest.masked_fill(~present, 0).sum(dim=-1) / present.sum(dim=-1).clamp(min=1)


def uniqueness(x: Tensor, valid: Tensor) -> Tensor:
    """How far from the middle of its segment an entry is, in the steadiest half of the channels.

    Args:
        x: [..., L, D].
        valid: [..., L] bool.

    Returns:
        [..., L] in [0, 1]: 0 for the entry nearest to the mean direction.
    """
    wide, width = x if x.dtype == torch.float64 else x.float(), x.shape[-1]
    if width > 10:
        centred = wide - segment_mean(wide, valid).unsqueeze(-2)
        variance = segment_mean(centred.square(), valid)
        # What a constant channel varies by is the square of a rounding.
        variance = variance * (variance > ROUNDING**2 * segment_mean(wide.square(), valid))
        half = torch.full(variance.shape[:-1], width // 2, device=x.device)
        wide = wide * topk_mask(-variance, torch.ones_like(variance, dtype=torch.bool), half).unsqueeze(-2)
    directions = unit(wide)
    distance = (directions - segment_mean(directions, valid).unsqueeze(-2)).square().sum(dim=-1)
    near = torch.stack([torch.exp(-distance / (2 * variance)) for variance in KERNELS]).sum(dim=0)
    return 1 - near / near.masked_fill(~valid, 0).amax(dim=-1, keepdim=True).clamp(min=1e-6)


def best_of_group(scores: Tensor, group: Tensor, groups: int, most: int, scale: Scale = 0.0) -> Tensor:
    """The `most` best-scored members of each group.

    Args:
        scores: [B, N].
        group: [B, N] long; entries in no group have `groups`.
        groups: number of groups.
        most: members taken per group.
        scale: of the scores' rounding, see `ops.topk`.

    Returns:
        [B, N] bool.
    """
    return (rank_in_group(-scores, group, groups, scale) < most) & (group < groups)
