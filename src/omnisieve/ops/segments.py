"""Cuts of tokens into segments, as padded indices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Cuts of one modality's tokens, of all samples at once, padded to the longest.

    Attributes:
        index: [B, G, L] long, token positions in sequence order; 0 where `valid` is False.
        valid: [B, G, L] bool.
        sizes: [B, G] int64 on the host, tokens per segment; 0 for segments that a sample does not have.
        first: [B, G] int64 on the host, position of the first token; 0 for segments without any.
        length: S, the sequence length the positions refer to.
    """

    index: Tensor
    valid: Tensor
    sizes: np.ndarray
    first: np.ndarray
    length: int

    def gather(self, values: Tensor) -> Tensor:
        """Per-token values [B, S, ...] as [B, G, L, ...]; padding slots hold the value of token 0."""
        batch, groups, length = self.index.shape
        flat = self.index.reshape(batch, groups * length)
        expanded = flat.reshape(flat.shape + (1,) * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
        return values.gather(1, expanded).reshape(batch, groups, length, *values.shape[2:])

    def scatter(self, values: Tensor, fill: float | bool) -> Tensor:
        """[B, G, L] back to per-token values [B, S]; `fill` where no segment has the token."""
        batch = self.index.shape[0]
        # One slot past the end takes the padding, so that it never overwrites a token.
        target = self.index.masked_fill(~self.valid, self.length).reshape(batch, -1)
        out = torch.full((batch, self.length + 1), fill, dtype=values.dtype, device=values.device)
        return out.scatter(1, target, values.reshape(batch, -1))[:, : self.length]


def pack(
    owner: np.ndarray, groups: int, slot: np.ndarray | None = None, length: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token positions per segment from segment ids [B, S].

    Args:
        owner: segment of each token, -1 for none.
        groups: G.
        slot: [B, S], place of each token in its segment; in sequence order without gaps when None.
        length: L, with `slot`.

    Returns:
        index [B, G, L], valid [B, G, L] and sizes [B, G].
    """
    batch, position = np.nonzero(owner >= 0)
    key = batch * groups + owner[batch, position]
    sizes = np.bincount(key, minlength=owner.shape[0] * groups)
    if slot is None:
        order = np.argsort(key, kind="stable")
        key, position = key[order], position[order]
        place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        length = max(int(sizes.max(initial=0)), 1)
    else:
        place = slot[batch, position]
    index = np.zeros((len(sizes), length), dtype=np.int64)
    valid = np.zeros(index.shape, dtype=bool)
    index[key, place] = position
    valid[key, place] = True
    shape = (owner.shape[0], groups, length)
    return index.reshape(shape), valid.reshape(shape), sizes.reshape(owner.shape[0], groups)
