"""Prunes the sequence between decoder layers, by a hook before each layer.

The state of a forward travels in the decoder's keywords, which reach every layer: it belongs to that forward, in
whatever thread a layer runs, and is there again when gradient checkpointing repeats a layer in the backward pass.
What was decided once is not decided again. States are pruned where they enter a layer, so a layer's output is whatever
the decoder makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from omnisieve.backbones.answers import IGNORED
from omnisieve.backbones.deepstack import select
from omnisieve.backbones.layer_attention import Rope, attention_of_rows, take_rope, take_states
from omnisieve.compressors.base import Compressor
from omnisieve.compressors.inner import InnerCompressor, Rows, ScoreAt
from omnisieve.layout import MEDIA, Modality, TokenLayout
from omnisieve.plan import Compressed, PaddingSide, Plan, compact

STATE = "omnisieve_state"
"""The decoder's keyword that carries the state of a forward."""


@dataclass(frozen=True, eq=False)
class Kept:
    """The tokens that are left at some point, K wide.

    Attributes:
        index: [B, K] long, positions in the whole sequence, those of a row all different.
        mask: [B, K] bool, False in padding; None when there is none.
        entry: [B, K] long, rows of the sequence that entered the decoder.
    """

    index: Tensor
    mask: Tensor | None
    entry: Tensor

    @staticmethod
    def entering(compressed: Compressed) -> Kept:
        """What enters the decoder."""
        index = compressed.index
        rows = torch.arange(index.shape[1], device=index.device).expand_as(index)
        return Kept(index, compressed.attention_mask if compressed.ragged else None, rows)

    @property
    def length(self) -> int:
        """K."""
        return self.index.shape[1]

    def spread(self, values: Tensor, length: int) -> Tensor:
        """Values [B, K] at their positions in the whole sequence, [B, S]; 0 where no token is left."""
        values = values if self.mask is None else values * self.mask
        out = torch.zeros(len(values), length, dtype=values.dtype, device=values.device)
        return out.scatter(1, self.index, values)

    def rows(self, positions: Tensor, length: int) -> Tensor:
        """Rows of the tokens at `positions` [B, ...] of the whole sequence; 0 for tokens that are gone."""
        numbers = torch.arange(self.length, device=positions.device).expand_as(self.index)
        return self.spread(numbers, length).gather(1, positions)


@dataclass(eq=False)
class HeldPrompt:
    """What a cache holds of a compressed prompt, for decoding on it.

    Attributes:
        layers: per decoder layer the tokens whose keys and values it holds.
    """

    layers: list[Kept]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Keys of the prompt per layer, padding included."""
        return tuple(kept.length for kept in self.layers)

    @property
    def uniform(self) -> bool:
        """Whether all layers hold the same tokens."""
        return all(kept is self.layers[0] for kept in self.layers)

    def mask(self, layer: int, new: int) -> Tensor | None:
        """[B, K + new] bool of a layer after `new` more tokens; None without padding."""
        mask = self.layers[layer].mask
        return None if mask is None else nn.functional.pad(mask, (0, new), value=True)


class LayerState(Protocol):
    """What changes the arguments of each layer of a forward."""

    def enter(self, layer: int, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Change `kwargs` in place and return the states [B, K, D] that the layer is to process."""


def before_layer(layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The hook of decoder layer `layer`."""
    state: LayerState | None = kwargs.pop(STATE, None)
    if state is None:
        return None
    return (state.enter(layer, args[0], kwargs), *args[1:]), kwargs


class DecodeStep:
    """One new token on a prompt whose layers hold different tokens."""

    def __init__(self, config: Any, prompt: HeldPrompt, new: int) -> None:
        self._config, self._prompt, self._new = config, prompt, new
        self._mask: tuple[Kept, Tensor | None] | None = None

    def enter(self, layer: int, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """See `LayerState.enter`."""
        kept = self._prompt.layers[layer]
        if self._mask is None or self._mask[0] is not kept:
            mask = self._prompt.mask(layer, self._new)
            self._mask = kept, _layer_mask(self._config, states, mask, kwargs["past_key_values"], layer)
        kwargs["attention_mask"] = self._mask[1]
        return states


class InnerRun:
    """A prompt or training forward with cuts."""

    def __init__(self, compressor: InnerCompressor, decoder: Any, layout: TokenLayout, plan: Plan) -> None:
        """Begin; raises UnreachableRatioError where the ratio cannot be had.

        Args:
            compressor: for the depth of the decoder.
            decoder: stock language model.
            layout: [B, S].
            plan: of the first stage.
        """
        self._compressor, self._decoder, self._layout = compressor, decoder, layout
        self._cuts, self._counts = compressor.cuts(), compressor.counts(layout)
        self._exact, self._fixed = plan.exact, layout.counts(Modality.TEXT, Modality.IMAGE)
        before = np.concatenate([(plan.kept - self._fixed)[None], self._counts])[: len(self._cuts)]
        removed, always = (before - self._counts).sum(axis=1), is_partitioned(decoder)
        # By the layer that the pruned states enter.
        self._cut_at = {cut.after + 1: number for number, cut in enumerate(self._cuts) if removed[number] or always}
        self._asking: dict[Rows, tuple[Tensor, Tensor]] = {}
        self._scores: dict[int, Tensor] = {}
        self._kept: dict[int, Kept] = {}
        self._arguments: tuple[Kept, dict[str, Any]] | None = None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._cut_at

    def start(self, kept: Kept, prompt: HeldPrompt, side: PaddingSide, *, masked: bool, labels: Tensor | None) -> None:
        """Tell what enters the decoder.

        Args:
            kept: what the first stage kept.
            prompt: of the cache, which every cut updates.
            side: where padding goes.
            masked: whether the attention of the layers must be told of padding.
            labels: [B, S] of the whole sequence, or None.
        """
        self._kept[0], self._prompt, self._side = kept, prompt, side
        self._masked, self._labels = masked, labels

    def enter(self, layer: int, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """See `LayerState.enter`."""
        before = self._kept_by(layer - 1)
        rope: Rope = kwargs["position_embeddings"]
        self._score(layer, states, before, rope, cut_here=True)
        if layer in self._cut_at:
            if layer not in self._kept:
                self._cut(layer, before, kwargs.get("past_key_values"))
            kept = self._kept[layer]
            states = take_states(states, before.rows(kept.index, self._layout.length))
        kept = self._kept_by(layer)
        self._score(layer, states, kept, rope, cut_here=False)
        if kept is not self._kept[0]:
            kwargs.update(self._arguments_for(kept, states, rope, kwargs["position_ids"]))
            select(kwargs, layer, kept.entry)
        return states

    def remaining(self, labels: Tensor) -> Tensor:
        """Labels [B, S] of the whole sequence at the rows that leave the last layer, [B, K]."""
        kept = self._kept_by(len(self._decoder.layers))
        labels = labels.gather(1, kept.index)
        return labels if kept.mask is None else labels.masked_fill(~kept.mask, IGNORED)

    def layer_counts(self) -> np.ndarray:
        """Video and audio tokens that each layer processed, int64 [L, B, 2], read back from the device."""
        counts = np.zeros((len(self._decoder.layers), self._layout.batch_size, len(MEDIA)), dtype=np.int64)
        for layer, kept in sorted(self._kept.items()):
            alive = self._alive(kept).cpu().numpy()
            for column, modality in enumerate(MEDIA):
                counts[layer:, :, column] = (alive & (self._layout.modality == modality)).sum(axis=1)
        return counts

    # Steps of `enter`.

    def _kept_by(self, layer: int) -> Kept:
        """What is left once the states have entered `layer`."""
        return self._kept[max(begin for begin in self._kept if begin <= max(layer, 0))]

    def _alive(self, kept: Kept) -> Tensor:
        """[B, S] bool."""
        return kept.spread(torch.ones_like(kept.index, dtype=torch.uint8), self._layout.length).bool()

    @torch.no_grad()
    def _score(self, layer: int, states: Tensor, kept: Kept, rope: Rope, *, cut_here: bool) -> None:
        """Take the scores that are due on these states, for the cut at this layer or for later ones."""
        for begin, number in self._cut_at.items():
            at = self._cuts[number].score
            if at is None or number in self._scores or (begin == layer) != cut_here:
                continue
            if layer == at.layer + (at.on == "output"):
                self._scores[number] = self._attention(at, states, kept, rope)

    def _attention(self, at: ScoreAt, states: Tensor, kept: Kept, rope: Rope) -> Tensor:
        """[B, S] float32."""
        if at.rows not in self._asking:
            self._asking[at.rows] = self._query_rows(at.rows)
        positions, valid = self._asking[at.rows]
        rows = kept.rows(positions, self._layout.length)
        visible = torch.arange(kept.length, device=rows.device) <= rows.unsqueeze(-1)
        visible = visible & valid.unsqueeze(-1)
        if kept.mask is not None:
            visible = visible & kept.mask.unsqueeze(1)
        own = take_rope(rope, kept.entry)
        received = attention_of_rows(self._decoder.layers[at.layer], states, own, rows, visible)
        return kept.spread(received, self._layout.length)

    def _query_rows(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Positions [B, R] in the whole sequence, and which of them count."""
        text = self._layout.modality == Modality.TEXT
        if rows == "text_after_media":
            media = np.isin(self._layout.modality, MEDIA)
            text = text & (np.cumsum(media[:, ::-1], axis=1)[:, ::-1] == 0)
        most = 1 if rows == "last_text" else int(text.sum(axis=1).max())
        asking = torch.from_numpy(text).to(self._layout.device, non_blocking=True)
        if self._labels is not None:
            asking = asking & ((self._labels != IGNORED).cumsum(dim=1) == 0)
        return compact(asking, most, "left")

    @torch.no_grad()
    def _cut(self, layer: int, before: Kept, cache: Any) -> None:
        number, length = self._cut_at[layer], self._layout.length
        media, alive = self._layout.mask(*MEDIA), self._alive(before)
        stay = alive & ~media
        if self._cuts[number].score is not None:
            scores = self._scores[number]
            stay = stay | (alive & media & self._compressor.keep_after(number, scores, alive & media, self._layout))
        totals = self._counts[number] + self._fixed
        index, mask = compact(stay, int(totals.max()), self._side)
        ragged = not self._exact or bool((totals != totals[0]).any())
        rows = before.rows(index, length)
        kept = Kept(index, mask if ragged else None, before.entry.gather(1, rows))
        self._kept[layer] = kept
        begin = layer
        if self._compressor.settings.kv_policy == "prune_all_layers":
            _prune_cache(cache, layer, rows)
            begin = 0
        self._prompt.layers[begin:] = [kept] * (len(self._prompt.layers) - begin)

    def _arguments_for(self, kept: Kept, states: Tensor, rope: Rope, sequence: Tensor | None) -> dict[str, Any]:
        """The keywords of a layer that processes `kept`."""
        if self._arguments is None or self._arguments[0] is not kept:
            mask = kept.mask if self._masked else None
            # Gaps in the sequence's own positions are read as packed sequences.
            present = torch.ones_like(kept.index) if kept.mask is None else kept.mask.long()
            self._arguments = (
                kept,
                {
                    "position_embeddings": take_rope(rope, kept.entry),
                    "position_ids": None if sequence is None else (present.cumsum(dim=1) - 1).clamp(min=0),
                    "attention_mask": _layer_mask(self._decoder.config, states, mask),
                },
            )
        return self._arguments[1]


def inner_run(compressor: Compressor, decoder: Any, layout: TokenLayout, plan: Plan) -> InnerRun | None:
    """The state of a forward with cuts; None where the compressor has none, or none that removes anything.

    Raises:
        UnreachableRatioError: the ratio cannot be had on this layout.
    """
    if not isinstance(compressor, InnerCompressor):
        return None
    run = InnerRun(compressor, decoder, layout, plan)
    return None if run.idle else run


def _layer_mask(config: Any, states: Tensor, mask: Tensor | None, cache: Any = None, layer: int = 0) -> Any:
    """What the attention of a layer takes for a mask [B, K] of its keys; None without padding."""
    # Where there is padding, looking whether there is would only wait for the device.
    return create_causal_mask(config, states, mask, cache, layer_idx=layer, allow_is_causal_skip=mask is None)


def is_partitioned(decoder: Any) -> bool:
    """Whether ZeRO-3 has spread the weights: then every rank must call the same modules, whatever its samples hold."""
    return any(hasattr(parameter, "ds_id") for parameter in decoder.layers[0].parameters())


def _prune_cache(cache: Any, layers: int, rows: Tensor) -> None:
    """Leave the keys and values of `rows` [B, K] in the first `layers` layers, which all hold the same tokens."""
    for layer in [] if cache is None else cache.layers[:layers]:
        if layer.is_initialized:
            heads, width = layer.keys.shape[1], layer.keys.shape[3]
            place = rows[:, None, :, None].expand(-1, heads, -1, width)
            layer.keys, layer.values = layer.keys.gather(2, place), layer.values.gather(2, place)
