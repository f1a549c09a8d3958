"""Attention of the encoders in few calls: one per layer and distinct segment length, on the stock SDPA function.

The towers attend within segments: windows, frames, pieces of sound. Under "sdpa" the stock modules call attention once
per segment. Only where the name of the implementation contains "flash" do they hand over the whole sequence with the
boundaries of its segments; this is how all supported versions of transformers ask for attention of variable length.
The function below is therefore registered under such a name. No hook is needed, no class is touched, and the modules
see the same arguments as ever, which hooks of statistics rely on.

The name is set after a model was loaded: transformers would look for a package of that name while it builds a model.
It belongs to the towers' own configs. The decoder keeps its implementation, and no config writes it to a file.

Segments of one length are a batch, so each has the kernel, the shape and the values of the stock loop, without padding
or a mask. The towers compute the longest length once per forward. Where all segments have it, no layer waits for the
device; where lengths differ, each layer reads them once, as the stock loop does.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from omnisieve.backbones.adapter import Adapter

BATCHED_SDPA = "omnisieve_batched_sdpa_in_flash_layout"


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function in the sense of `transformers.AttentionInterface`: every segment attends to itself.

    Args:
        module: the attention module that asks.
        query, key, value: [1, H, N, d].
        attention_mask: the stock towers have none.
        cu_seq_lens_q: [G + 1], where segments begin; the first is 0, the last N.
        max_length_q: of the longest segment.
        kwargs: scaling, dropout and causality, as the SDPA function takes them.

    Returns:
        [1, N, H, d], and None for the weights, which are never materialised.
    """

    def attend(rows: list[Tensor], length: int) -> Tensor:
        """[M, H, d] of segments of one length that follow each other."""
        batch = (part.unflatten(0, (-1, length)).transpose(1, 2) for part in rows)
        return sdpa_attention_forward(module, *batch, None, **kwargs)[0].flatten(0, 1)

    rows = [states[0].transpose(0, 1) for states in (query, key, value)]
    count = len(rows[0])
    if max_length_q * (len(cu_seq_lens_q) - 1) == count:
        return attend(rows, max_length_q)[None], None
    lengths = cu_seq_lens_q.diff()
    segments = Counter(filter(None, lengths.tolist()))
    order = _by_length(cu_seq_lens_q[:-1], lengths, count).to(query.device)
    found = torch.empty_like(rows[2])
    for length, places in zip(sorted(segments), order.split([n * segments[n] for n in sorted(segments)]), strict=True):
        found.index_copy_(0, places, attend([part.index_select(0, places) for part in rows], length))
    return found[None], None


def _by_length(starts: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Rows [N] of all segments, short segments first; computed where the lengths are."""
    lengths, order = lengths.sort(stable=True)
    moved = starts[order] - (lengths.cumsum(0) - lengths)
    return torch.arange(count, device=lengths.device) + moved.repeat_interleave(lengths, output_size=count)


AttentionInterface.register(BATCHED_SDPA, segment_attention)


def batch_tower_attention(adapter: Adapter) -> None:
    """Let both towers of a loaded model attend in few calls from now on."""
    for tower in (adapter.audio_tower, adapter.visual):
        tower.config._attn_implementation = BATCHED_SDPA
