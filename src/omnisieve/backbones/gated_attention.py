"""Attention whose keys carry a factor: A = g softmax(l) / sum(g softmax(l)), on any fused kernel.

With p = softmax(l) the output is (p @ (g v)) / (p @ g): the values are multiplied by g, g itself rides along as one
more value column, and the kernel never knows. A key with g = 0 is invisible, so the value is that of a sequence
without it; its gate still has a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GATED = "omnisieve_gated"
# Fused kernels want q, k and v of one width, a multiple of this.
WIDTH_STEP = 8


def gated_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    key_gate: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function in the sense of `transformers.AttentionInterface`.

    Args:
        module: the attention module that asks.
        query: [B, H, Q, d].
        key, value: [B, H_kv, K, d].
        attention_mask: as the SDPA function takes it; None is causal.
        key_gate: [B, K], factor of each key; a decoder's keyword of this name reaches every layer.
        scaling: of the logits; 1 / sqrt(d) when None.

    Returns:
        [B, Q, H, d], and None for the weights, which are never materialised.
    """
    width = query.shape[-1]
    gate = key_gate.to(value.dtype)[:, None, :, None]
    value = torch.cat([value * gate, gate.expand(-1, value.shape[1], -1, -1)], dim=-1)
    padded = -(-value.shape[-1] // WIDTH_STEP) * WIDTH_STEP
    query, key, value = (nn.functional.pad(x, (0, padded - x.shape[-1])) for x in (query, key, value))
    scaling = width**-0.5 if scaling is None else scaling
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # A row that sees no gate at all is padding; the clamp keeps it and its gradient finite.
    mass = output[..., width : width + 1].clamp(min=torch.finfo(output.dtype).tiny)
    return output[..., :width] / mass, None


AttentionInterface.register(GATED, gated_attention)
AttentionMaskInterface.register(GATED, sdpa_mask)


class GatedAttentionSwitch:
    """Makes a decoder use gated attention while it needs to.

    The switch stays on after a forward, because gradient checkpointing runs layers again in the backward pass.
    """

    def __init__(self, decoder: Any) -> None:
        self._config = decoder.config
        self._own: str = decoder.config._attn_implementation

    def set(self, gated: bool) -> None:
        """Choose for the forwards to come."""
        wanted = GATED if gated else self._own
        if self._config._attn_implementation != wanted:
            self._config._attn_implementation = wanted


@contextmanager
def gated_attention_switch(decoder: Any) -> Iterator[GatedAttentionSwitch]:
    """A switch that is off again when the context ends, also by an exception."""
    switch = GatedAttentionSwitch(decoder)
    try:
        yield switch
    finally:
        switch.set(False)
