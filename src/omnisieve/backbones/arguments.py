"""Which arguments of a decoder can be compressed, and what follows from them."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache

from omnisieve.backbones.adapter import Adapter, BackboneError
from omnisieve.backbones.deepstack import VISUAL, is_given
from omnisieve.backbones.inner import InnerRun
from omnisieve.backbones.router_mask import asked_for_router_logits
from omnisieve.layout import MEDIA, Modality, TokenLayout
from omnisieve.plan import PaddingSide, Plan


def check_arguments(adapter: Adapter, run: InnerRun | None, layout: TokenLayout, kwargs: dict[str, Any]) -> None:
    """Refuse what the decoder cannot do with fewer tokens."""
    if adapter.speaks and kwargs.get("output_hidden_states"):
        raise BackboneError("speech needs the states of all tokens: generate with generation_mode='text'")
    if kwargs.get("position_ids") is None and layout.counts(*MEDIA).any():
        raise BackboneError("give position_ids [3, B, S] beside inputs_embeds: the model would count kept tokens anew")
    if adapter.deepstack_layers and not is_given(kwargs) and layout.counts(*VISUAL).any():
        raise BackboneError(
            "this model also adds visual features behind its first layers: when you give inputs_embeds, call it inside "
            "`with adapter.deepstack(features, layout)`"
        )
    if run is not None and asked_for_router_logits(kwargs):
        raise BackboneError(
            "output_router_logits: the stock load-balancing loss wants the same tokens in all layers, and "
            "this compressor drops some inside the LLM"
        )


def padding_side_of(layout: TokenLayout, *, cached: bool) -> PaddingSide:
    """Where the padding of a ragged result goes: where the input has it, else left to decode on, right to train."""
    padding = layout.modality == Modality.PADDING
    if padding[:, 0].any():
        return "left"
    return "right" if padding[:, -1].any() or not cached else "left"


def cache_of(adapter: Adapter, plan: Plan, cache: Any, kwargs: dict[str, Any]) -> DynamicCache | None:
    """The cache of this forward, made here when the decoder would make one, so that decoding finds its state."""
    if plan.candidates is not None:
        if cache is not None:
            raise BackboneError("the masked route is for training: call the model without past_key_values")
        kwargs["use_cache"] = False
        return None
    use_cache = kwargs.get("use_cache")
    if cache is None and (adapter.decoder.config.use_cache if use_cache is None else use_cache):
        cache = kwargs["past_key_values"] = DynamicCache(config=adapter.decoder.config)
    if cache is not None and not isinstance(cache, DynamicCache):
        raise BackboneError(
            f"{type(cache).__name__} has a fixed length or layout: generate with the default dynamic cache "
            "(no cache_implementation)"
        )
    return cache
