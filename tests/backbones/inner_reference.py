"""Pruning inside the LLM written out by hand: one sample, one layer after another, nothing shared with the package.

Attention is computed in full, so scores are read off the attention matrices themselves. Tokens are named by their
position in the whole sequence; keys and values are dictionaries from position to vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import apply_rotary_pos_emb

Choose = Callable[[dict[int, float]], set[int]]
"""From the scores of the media tokens that are left to those that stay."""


@dataclass(frozen=True)
class Step:
    """A cut: after which layer, whose attention on which states, from which rows; `choose` None removes all media."""

    after: int
    choose: Choose | None = None
    layer: int = 0
    on: Literal["input", "output"] = "input"
    rows: Sequence[int] = ()


class Reference:
    """A stock decoder run by hand on one sample.

    Args:
        decoder: stock language model of either family.
        steps: the cuts.
        media: positions of video and audio tokens.
        prune_all: whether a cut also forgets keys and values of the layers before.
        added: [S, D] that the decoder adds to the states behind its first layers.
    """

    def __init__(
        self,
        decoder: nn.Module,
        steps: Sequence[Step],
        media: set[int],
        *,
        prune_all: bool = False,
        added: Sequence[Tensor] = (),
    ) -> None:
        self.decoder, self.steps, self.media, self.prune_all, self.added = decoder, steps, media, prune_all, added
        self.caches: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in decoder.layers]

    def prefill(self, embeds: Tensor, positions: Tensor, entering: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Last hidden states [K, D] and their positions, of embeddings [S, D] and rope positions [3, S]."""
        left, states = list(entering), embeds[list(entering)]
        scores: dict[int, dict[int, float]] = {}
        for number in range(len(self.decoder.layers)):
            self._look(scores, [s for s in self.steps if s.after >= number], number, states, left, positions)
            states = self._layer(number, states, left, positions)
            if number < len(self.added):
                states = states + self.added[number][left]
            self._look(scores, [s for s in self.steps if s.after == number], number + 1, states, left, positions)
            for step in self.steps:
                if step.after != number:
                    continue
                stay = set() if step.choose is None else step.choose(scores[step.after])
                kept = [p for p in left if p not in self.media or p in stay]
                states, left = states[[left.index(p) for p in kept]], kept
                for cache in self.caches[: number + 1] if self.prune_all else []:
                    for position in set(cache) - set(kept):
                        del cache[position]
        return self.decoder.norm(states), left

    def decode(self, embed: Tensor, name: int, rope: float) -> Tensor:
        """Last hidden state [D] of a new token `name` with embedding [D] at rope position `rope`."""
        state, positions = embed[None], torch.full((3, name + 1), float(rope))
        for number in range(len(self.decoder.layers)):
            state = self._layer(number, state, [name], positions)
        return self.decoder.norm(state)[0]

    def greedy(
        self, lm_head: nn.Module, embeds: Tensor, positions: Tensor, entering: Sequence[int], n: int
    ) -> list[int]:
        """`n` greedy tokens."""
        with torch.no_grad():
            state, following = self.prefill(embeds, positions, entering)[0][-1], float(positions.max()) + 1
            tokens: list[int] = []
            while len(tokens) < n:
                tokens.append(int(lm_head(state).argmax()))
                place = len(tokens) - 1
                embed = self.decoder.embed_tokens(torch.tensor(tokens[-1]))
                state = self.decode(embed, len(embeds) + place, following + place)
            return tokens

    def _layer(self, number: int, states: Tensor, names: list[int], positions: Tensor) -> Tensor:
        layer, cache = self.decoder.layers[number], self.caches[number]
        normed = layer.input_layernorm(states)
        query, key = self._query(number, normed, names, positions), self._key(number, normed, names, positions)
        value = self._heads(number, layer.self_attn.v_proj(normed), None)
        cache.update({name: (key[:, row], value[:, row]) for row, name in enumerate(names)})
        seen = sorted(cache)
        keys, values = (torch.stack([cache[name][part] for name in seen], dim=1) for part in (0, 1))
        mixed = self._weights(query, keys, names, seen) @ values
        states = states + layer.self_attn.o_proj(mixed.transpose(0, 1).flatten(1))
        return states + layer.mlp(layer.post_attention_layernorm(states)[None])[0]

    def _look(
        self, scores: dict, steps: list[Step], depth: int, states: Tensor, left: list[int], positions: Tensor
    ) -> None:
        """Take the scores of those `steps` that want them on the states behind `depth` layers."""
        for step in steps:
            if step.choose is None or step.layer + (step.on == "output") != depth:
                continue
            normed = self.decoder.layers[step.layer].input_layernorm(states)
            query, key = (f(step.layer, normed, left, positions) for f in (self._query, self._key))
            weights = self._weights(query, key, left, left).mean(dim=0)
            received = weights[[left.index(row) for row in step.rows]].mean(dim=0)
            scores[step.after] = {p: float(received[i]) for i, p in enumerate(left) if p in self.media}

    def _weights(self, query: Tensor, key: Tensor, asking: list[int], seen: list[int]) -> Tensor:
        logits = query @ key.mT * query.shape[-1] ** -0.5
        future = torch.tensor(seen)[None] > torch.tensor(asking)[:, None]
        return logits.masked_fill(future, -torch.inf).softmax(dim=-1)

    def _heads(self, number: int, values: Tensor, norm: nn.Module | None) -> Tensor:
        attention = self.decoder.layers[number].self_attn
        values = values.unflatten(-1, (-1, attention.head_dim))
        values = (values if norm is None else norm(values)).transpose(0, 1)
        return values.repeat_interleave(self.decoder.config.num_attention_heads // len(values), dim=0)

    def _query(self, number: int, normed: Tensor, names: list[int], positions: Tensor) -> Tensor:
        return self._rotated(number, "q", normed, names, positions)

    def _key(self, number: int, normed: Tensor, names: list[int], positions: Tensor) -> Tensor:
        return self._rotated(number, "k", normed, names, positions)

    def _rotated(self, number: int, kind: str, normed: Tensor, names: list[int], positions: Tensor) -> Tensor:
        attention = self.decoder.layers[number].self_attn
        projected = getattr(attention, f"{kind}_proj")(normed)
        heads = self._heads(number, projected, getattr(attention, f"{kind}_norm", None))
        cos, sin = self.decoder.rotary_emb(heads, positions[:, None, names])
        return apply_rotary_pos_emb(heads[None], heads[None], cos, sin)[0][0]
