"""How much attention positions receive inside segments, without ever holding all weights of a long segment.

Segments lie one after another along the first dimension. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

QUERY_BLOCK = 256
# Attention weights held at once (float32), 256 MiB.
MAX_WEIGHTS = 1 << 26


def attention_received(query: Tensor, key: Tensor, lengths: Sequence[int] | np.ndarray, scaling: float) -> Tensor:
    """Attention that every position receives from its own segment.

    Args:
        query, key: [N, H, d].
        lengths: positions per segment, N in total.
        scaling: of the logits.

    Returns:
        [N] float32, mean over heads and sum over queries; the mean over a segment is 1.
    """
    received = torch.zeros(query.shape[0], device=query.device)
    for places in _equal_segments(lengths, query.device):
        per_query = query.shape[1] * places.shape[1]
        block = min(QUERY_BLOCK, places.shape[1], max(1, MAX_WEIGHTS // per_query))
        for part in places.split(max(1, MAX_WEIGHTS // (per_query * block))):
            received[part] = _by_query_blocks(query[part], key[part], scaling, block)
    return received


def _by_query_blocks(query: Tensor, key: Tensor, scaling: float, block: int) -> Tensor:
    """[G, L, H, d] to [G, L]; weights of `block` queries exist at a time."""
    keys = key.permute(0, 2, 3, 1).float()
    received = torch.zeros(query.shape[:2], device=query.device)
    for queries in query.permute(0, 2, 1, 3).split(block, dim=2):
        received += (queries.float() @ keys * scaling).softmax(dim=-1).mean(dim=1).sum(dim=1)
    return received


def mean_query_attention(
    query: Tensor, key: Tensor, lengths: Sequence[int] | np.ndarray, scaling: float, unit: int
) -> Tensor:
    """Attention of each segment's mean query to the mean keys of groups of `unit` neighbours (FastVID, Qwen variant).

    Args:
        query, key: [N, H, d].
        lengths: positions per segment, multiples of `unit`, N in total.
        scaling: of the logits.
        unit: positions that share one key.

    Returns:
        [N] float32, softmax over the groups of a segment, mean over heads, times the number of groups (so that the
        mean over a segment is 1), the same for all positions of a group.
    """
    attention = torch.zeros(query.shape[0], device=query.device)
    for places in _equal_segments(lengths, query.device):
        mean_query = query[places].float().mean(dim=1)
        keys = key[places].float().unflatten(1, (-1, unit)).mean(dim=2)
        weights = (torch.einsum("ghd,gnhd->gnh", mean_query, keys) * scaling).softmax(dim=1).mean(dim=-1)
        attention[places] = (weights * keys.shape[1]).repeat_interleave(unit, dim=1)
    return attention


def _equal_segments(lengths: Sequence[int] | np.ndarray, device: torch.device) -> Iterator[Tensor]:
    """Positions [G, L] of the segments of each length L."""
    sizes = np.asarray(lengths)
    starts = np.cumsum(sizes) - sizes
    for size in np.unique(sizes[sizes > 0]):
        yield torch.from_numpy(starts[sizes == size][:, None] + np.arange(size)).to(device)
