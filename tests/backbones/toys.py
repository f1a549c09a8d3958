"""Toy compressors and a reference decoder for the backbone tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    decoder: nn.Module, lm_head: nn.Module, prompt: Mapping[str, Any], keep: Tensor, positions: Tensor, steps: int
) -> list[int]:
    """Greedy decoding of one sample without cache or padding.

    Args:
        decoder, lm_head: of the stock model.
        prompt: what the stock model hands to its decoder, see `stock_prompt`.
        keep: [S] bool, tokens that stay.
        positions: [3, 1, S] rope ids of all tokens.
        steps: tokens to generate.
    """
    tokens: list[int] = []
    embeds, positions = prompt["inputs_embeds"][:, keep], positions[:, :, keep]
    following = positions.max() + 1
    visual: dict[str, Any] = {}
    if prompt.get("visual_pos_masks") is not None:
        seen = prompt["visual_pos_masks"][0]
        features = [values[keep[seen]] for values in prompt["deepstack_visual_embeds"]]
        visual = {"visual_pos_masks": (seen & keep)[None, keep], "deepstack_visual_embeds": features}
    with torch.no_grad():
        for _ in range(steps):
            states = decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False, **visual).last_hidden_state
            tokens.append(int(lm_head(states[:, -1]).argmax()))
            embeds = torch.cat([embeds, decoder.embed_tokens(torch.tensor([[tokens[-1]]]))], dim=1)
            positions = torch.cat([positions, (following + len(tokens) - 1).expand(3, 1, 1)], dim=-1)
            if visual:
                visual["visual_pos_masks"] = nn.functional.pad(visual["visual_pos_masks"], (0, 1))
    return tokens


def stock_embeds(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Merged embeddings of the stock forward, [B, S, D]."""
    return stock_prompt(model, inputs)["inputs_embeds"]


def stock_prompt(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the stock forward hands to its decoder."""
    decoder = getattr(model.model, "language_model", model.model)
    seen: list[dict[str, Any]] = []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(dict(kwargs))

    handle = decoder.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]
