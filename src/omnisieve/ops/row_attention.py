"""Attention of a few query rows, never that of all rows."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_AT_ONCE = 64


def row_attention(query: Tensor, key: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """Attention that each key gets, averaged over heads and query rows.

    Args:
        query: [B, H, R, d].
        key: [B, H_kv, K, d], H a multiple of H_kv.
        visible: [B, R, K] bool, the keys of each row's softmax; a row that sees none is left out of the mean.
        scaling: of the logits.

    Returns:
        [B, K] float32; sums to 1 wherever a row sees anything.
    """
    batch, kv_heads, length, _ = key.shape
    keys = key.float().mT.unsqueeze(2)
    received = torch.zeros(batch, length, device=key.device)
    for rows, seen in zip(query.split(ROWS_AT_ONCE, dim=2), visible.split(ROWS_AT_ONCE, dim=1), strict=True):
        grouped = rows.float().unflatten(1, (kv_heads, -1))
        seen = seen[:, None, None]
        logits = (grouped @ keys * scaling).masked_fill(~seen, torch.finfo(torch.float32).min)
        received = received + (logits.softmax(dim=-1) * seen).sum(dim=(1, 2, 3))
    return received / (query.shape[1] * visible.any(dim=-1).sum(dim=-1, keepdim=True).clamp(min=1))
