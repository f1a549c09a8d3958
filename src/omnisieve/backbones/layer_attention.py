"""Attention of a few rows in a stock decoder layer, from its own norm, projections and rotary function.

Weights are used through module calls only: adapters of peft take part, and partitioned weights are gathered.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from omnisieve.ops.row_attention import row_attention

Rope = tuple[Tensor, Tensor]
"""What a decoder's rotary embedding gives: cosines and sines, [..., K, d] each."""


def attention_of_rows(layer: Any, states: Tensor, rope: Rope, rows: Tensor, visible: Tensor) -> Tensor:
    """Attention that each token gets from some rows, averaged over heads and rows.

    Args:
        layer: decoder layer with `input_layernorm` and `self_attn`.
        states: [B, K, D], what the norm is applied to.
        rope: of the K tokens.
        rows: [B, R] long, the querying rows.
        visible: [B, R, K] bool; a row that sees nothing does not count.

    Returns:
        [B, K] float32.
    """
    attention = layer.self_attn
    with _evaluating(layer.input_layernorm, attention):
        normed = layer.input_layernorm(states)
        query = _heads(attention, "q", take_states(normed, rows))
        key = _heads(attention, "k", normed)
    query, key = _rotate(attention, query, take_rope(rope, rows)), _rotate(attention, key, rope)
    return row_attention(query, key, visible, attention.scaling)


def take_states(states: Tensor, rows: Tensor) -> Tensor:
    """[B, K, D] at `rows` [B, R]: [B, R, D]."""
    return states.gather(1, rows.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def take_rope(rope: Rope, rows: Tensor) -> Rope:
    """Cosines and sines at `rows` [B, R], [..., R, d] each."""
    cos, sin = (x.gather(-2, rows.unsqueeze(-1).expand(*x.shape[:-2], -1, x.shape[-1])) for x in rope)
    return cos, sin


def _heads(attention: Any, name: str, states: Tensor) -> Tensor:
    """Queries or keys before rotation, [B, H, K, d]."""
    values = getattr(attention, f"{name}_proj")(states).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)  # Qwen3 norms each head
    return (values if norm is None else norm(values)).transpose(1, 2)


def _rotate(attention: Any, values: Tensor, rope: Rope) -> Tensor:
    """Queries or keys [B, H, K, d] rotated by the function of the attention's own family."""
    rotary = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotary(values, values, *rope)[0]


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Without dropout, in adapters for instance: scores decide, and must not draw random numbers."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
