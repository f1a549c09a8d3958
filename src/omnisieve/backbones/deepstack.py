"""Deepstack: visual features that the decoder of Qwen3-Omni adds to the states behind its first layers.

The stock decoder is given the features of all visual tokens, [N, D] for each of these layers, and a mask [B, S] of
where they go. A compressed prompt has them taken over: one [B, K, D] for each layer, zero where a token is not visual,
under a keyword of the decoder that reaches every layer and that a hook behind the layer adds. Nothing has to be
counted on the device, and what drops tokens inside the LLM indexes them like any other per-token tensor (`select`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omnisieve.layout import Modality, TokenLayout

DEEPSTACK = "omnisieve_deepstack"
"""The decoder's keyword: features [B, K, D] of each of the first layers."""
VISUAL = (Modality.IMAGE, Modality.VIDEO)
_MASK, _FEATURES = "visual_pos_masks", "deepstack_visual_embeds"


def is_given(kwargs: dict[str, Any]) -> bool:
    """Whether the decoder's keywords hold features as the stock model hands them over."""
    return kwargs.get(_FEATURES) is not None


def take_over(kwargs: dict[str, Any], index: Tensor, mask: Tensor) -> None:
    """Move the decoder's deepstack keywords to our own, at the tokens that stay.

    Args:
        kwargs: of the decoder; changed in place, and left alone where there are no features.
        index: [B, K] long, positions in the sequence that the keywords are for.
        mask: [B, K] bool, False in padding.
    """
    if not is_given(kwargs):
        return
    visual, features = kwargs.pop(_MASK), kwargs.pop(_FEATURES)
    row = (visual.flatten().cumsum(0) - 1).clamp(min=0).view_as(visual)
    rows, absent = row.gather(1, index), ~(visual.gather(1, index) & mask).unsqueeze(-1)
    kwargs[DEEPSTACK] = tuple(
        values.index_select(0, rows.flatten()).unflatten(0, rows.shape).masked_fill(absent, 0) for values in features
    )


def select(kwargs: dict[str, Any], layer: int, rows: Tensor) -> None:
    """Let a layer that sees fewer tokens have the features of those.

    Args:
        kwargs: of the layer; changed in place, and left alone where nothing is added behind the layer.
        layer: its number.
        rows: [B, R] long, of the K tokens that entered the decoder.
    """
    features = list(kwargs.get(DEEPSTACK, ()))
    if layer < len(features):
        width = features[layer].shape[-1]
        features[layer] = features[layer].gather(1, rows.unsqueeze(-1).expand(-1, -1, width))
        kwargs[DEEPSTACK] = features


def install_deepstack(layers: nn.ModuleList, hooks: ExitStack) -> None:
    """Add features that were taken over behind `layers`, until `hooks` is closed."""
    for place, layer in enumerate(layers):
        hooks.callback(layer.register_forward_hook(partial(_add, place), with_kwargs=True).remove)


def _add(place: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    features: Sequence[Tensor] | None = kwargs.get(DEEPSTACK)
    return None if features is None else output + features[place].to(output.device, output.dtype)


@contextmanager
def hand_over(
    decoder: nn.Module, image: Sequence[Tensor], video: Sequence[Tensor], layout: TokenLayout
) -> Iterator[None]:
    """Give the decoder deepstack features with prompts of merged embeddings, as the stock model does with pixels.

    Args:
        decoder: stock language model.
        image, video: [N, D] for each layer, in sequence order; empty without such tokens.
        layout: of the prompts; a forward may widen it to beams.
    """
    handle = decoder.register_forward_pre_hook(
        partial(_hand_over, image, video, layout), with_kwargs=True, prepend=True
    )
    try:
        yield
    finally:
        handle.remove()


def _hand_over(
    image: Sequence[Tensor],
    video: Sequence[Tensor],
    layout: TokenLayout,
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    embeds: Tensor = kwargs["inputs_embeds"]
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        return None  # decoding: what is added is in the cache
    beams = embeds.shape[0] // layout.batch_size
    modality = layout.modality.repeat(beams, axis=0)
    # The stock order is that of the sequence; ours has images first.
    row = np.zeros_like(layout.modality)
    images, videos = (layout.modality == kind for kind in VISUAL)
    row[images] = np.arange(images.sum())
    row[videos] = np.arange(videos.sum()) + images.sum()
    visual = np.isin(modality, VISUAL)
    rows = torch.from_numpy(row.repeat(beams, axis=0)[visual]).to(embeds.device, non_blocking=True)
    kwargs[_MASK] = torch.from_numpy(visual).to(embeds.device, non_blocking=True)
    parts = zip(*(values for values in (image, video) if values), strict=True)
    kwargs[_FEATURES] = [torch.cat([p.to(embeds.device) for p in part])[rows] for part in parts]
    return args, kwargs
