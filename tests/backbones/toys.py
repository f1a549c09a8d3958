"""Toy compressors and a reference decoder for the backbone tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from omnisieve.compressors.base import Compressor, Need, Needs, Settings
from omnisieve.layout import MEDIA, Modality, TokenLayout
from omnisieve.ops.estimators import straight_through
from omnisieve.plan import Plan

AUDIO_NEED = Need("attention_received", Modality.AUDIO)


class NormCompressor(Compressor):
    """Keeps the tokens whose embeddings are largest."""

    name = "toy_norm"

    def plan(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> Plan:
        scores = self.scores(embeds, layout, needs or {})
        keep = torch.stack([self.select(modality, scores, layout) for modality in MEDIA]).any(dim=0)
        gate = None
        if torch.is_grad_enabled() and scores.requires_grad:
            gate = torch.where(layout.mask(*MEDIA), straight_through(keep, scores), 1.0)
        return self.make_plan(layout, keep, scores=scores.detach(), gate=gate)

    def scores(self, embeds: Tensor, layout: TokenLayout, needs: Mapping[Need, Tensor]) -> Tensor:
        return embeds.norm(dim=-1)


class NeedyCompressor(NormCompressor):
    """Ranks audio by attention received in the encoder."""

    name = "toy_needy"

    @property
    def needs(self) -> tuple[Need, ...]:
        return (AUDIO_NEED,)

    def scores(self, embeds: Tensor, layout: TokenLayout, needs: Mapping[Need, Tensor]) -> Tensor:
        return torch.where(layout.mask(Modality.AUDIO), needs[AUDIO_NEED], embeds.norm(dim=-1))


class LearnedToy(NormCompressor):
    """Scores are the sigmoid of a linear function of the embedding."""

    name = "toy_learned"
    learned = True

    def __init__(self, settings: Settings, hidden_size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(settings)
        self.hidden_size = hidden_size
        torch.manual_seed(5)
        self.scorer = nn.Linear(hidden_size, 1, dtype=dtype)

    def scores(self, embeds: Tensor, layout: TokenLayout, needs: Mapping[Need, Tensor]) -> Tensor:
        self.latest = self.scorer(embeds.to(self.scorer.weight.dtype)).squeeze(-1).sigmoid()
        if self.latest.requires_grad:
            self.latest.retain_grad()
        return self.latest


def norm_compressor(ratio: float = 0.3, **changes) -> NormCompressor:
    return NormCompressor(Settings(retained_ratio=ratio, **changes))


def learned_toy(hidden_size: int, ratio: float = 0.3, dtype: torch.dtype = torch.float32) -> LearnedToy:
    return LearnedToy(Settings(retained_ratio=ratio), hidden_size, dtype)


def greedy_reference(
    decoder: nn.Module, lm_head: nn.Module, embeds: Tensor, positions: Tensor, steps: int
) -> list[int]:
    """Greedy decoding of one sample without cache or padding.

    Args:
        decoder, lm_head: of the stock model.
        embeds: [1, K, D] compressed prompt.
        positions: [3, 1, K] rope ids of its tokens.
        steps: tokens to generate.
    """
    tokens: list[int] = []
    following = positions.max() + 1
    with torch.no_grad():
        for _ in range(steps):
            states = decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
            tokens.append(int(lm_head(states[:, -1]).argmax()))
            embeds = torch.cat([embeds, decoder.embed_tokens(torch.tensor([[tokens[-1]]]))], dim=1)
            positions = torch.cat([positions, (following + len(tokens) - 1).expand(3, 1, 1)], dim=-1)
    return tokens


def stock_embeds(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the stock forward hands to its decoder, [B, S, D]."""
    decoder = getattr(model.model, "language_model", model.model)
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs["inputs_embeds"])

    handle = decoder.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]
