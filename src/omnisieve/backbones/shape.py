"""The sizes of a decoder that its cost depends on, read from a stock config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from omnisieve.backbones.adapter import BackboneError


@dataclass(frozen=True)
class DecoderShape:
    """A decoder of gated feed-forward layers and grouped-query attention.

    Attributes:
        layers: L.
        hidden_size: D.
        heads, kv_heads: of the attention.
        head_dim: width of a head.
        intermediate_size: feed-forward width that a token passes: of all its experts together.
        vocabulary: rows of the head.
        experts: outputs of the router; 0 without experts.
        kv_element_size: bytes of one number in the KV cache.
    """

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocabulary: int
    experts: int = 0
    kv_element_size: int = 2

    @property
    def attention_width(self) -> int:
        """Width of queries."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of keys, and of values."""
        return self.kv_heads * self.head_dim

    def as_published(self) -> DecoderShape:
        """The shape as papers count it: heads share the width D, and a router costs nothing."""
        return replace(self, head_dim=self.hidden_size // self.heads, experts=0)


def decoder_shape(config: Any, kv_element_size: int = 2) -> DecoderShape:
    """Read a decoder's config, dense or with experts in every layer.

    Args:
        config: of the decoder, such as `Adapter.decoder.config`.
        kv_element_size: bytes of one number in the KV cache; 2 in bfloat16.

    Raises:
        BackboneError: dense layers and layers with experts are mixed.
    """
    experts = getattr(config, "num_experts", 0)
    if experts and (config.decoder_sparse_step != 1 or config.mlp_only_layers):
        raise BackboneError(
            "a decoder that mixes layers with and without experts (decoder_sparse_step, mlp_only_layers) has no single "
            "shape; only dense decoders and those with experts in every layer are supported"
        )
    expert_width = config.num_experts_per_tok * config.moe_intermediate_size if experts else 0
    return DecoderShape(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate_size=expert_width or config.intermediate_size,
        vocabulary=config.vocab_size,
        experts=experts,
        kv_element_size=kv_element_size,
    )
