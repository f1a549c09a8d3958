"""Logits at answer rows only: the head's output over a whole long sequence would not fit."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100


def answer_rows(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows whose next token is an answer token, and that token.

    Args:
        labels: [B, K], an answer token's own id at its place, -100 elsewhere.
        count: N, how many labels are not -100, counted on the host so that nothing waits for the device. The first
            token of a sequence has no row before it and must not be one of them.

    Returns:
        rows [N] into [B * K], in order, and targets [N].
    """
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    rows = (following == IGNORED).to(torch.uint8).argsort(stable=True)[:count]
    return rows, following[rows]


def take_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """[B, K, D] to [N, D]."""
    return hidden.flatten(0, 1).index_select(0, rows)
