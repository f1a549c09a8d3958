"""Cosine similarities over padded segments. Everything is computed in float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the last dimensions, [...]; norms are clamped at 1e-8, so a zero vector has cosine 0."""
    return torch.nn.functional.cosine_similarity(_wide(a), _wide(b), dim=-1, eps=EPS)


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1, [..., D]; zero rows stay zero."""
    return torch.nn.functional.normalize(_wide(x), dim=-1, eps=EPS)


def symmetric(pairs: Tensor) -> Tensor:
    """The same value for both orders of a pair, [..., L, L].

    A matrix product rounds the two apart, in another way for every shape. Two entries that are nearest to each other
    would be told apart by that, and the choice between them would depend on the batch.
    """
    return torch.minimum(pairs, pairs.transpose(-1, -2))


def segment_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid rows of each segment, [..., L, D] -> [..., D]; zeros for an empty segment."""
    total = _wide(x).masked_fill(~valid.unsqueeze(-1), 0).sum(dim=-2)
    return total / valid.sum(dim=-1, keepdim=True).clamp(min=1)


def cosine_to_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Cosine of every row to the mean of its segment, [..., L, D] -> [..., L]."""
    return cosine(x, segment_mean(x, valid).unsqueeze(-2))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
