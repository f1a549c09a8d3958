"""Tiny random encoders of both families, and what their last blocks really do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omnisieve.backbones.saliency import install_saliency
from omnisieve.compressors.base import Need
from omnisieve.layout import Modality
from tests.models import MEL_BINS, QWEN2_5, QWEN3, tiny_thinker

MEL = [1730, 207, 400, 45]
GRIDS = [[3, 6, 10], [1, 4, 4], [4, 8, 6]]  # also of windows that do not fill the frame


@dataclass(frozen=True)
class Tower:
    """An encoder, its modality, and inputs of several items."""

    name: str
    module: Any
    modality: Modality
    items: tuple[tuple[Tensor, Tensor], ...]

    def run(self, items: slice = slice(None)) -> Any:
        """Encode some of the items in one call."""
        parts, sizes = zip(*self.items[items], strict=True)
        if self.modality == Modality.AUDIO:
            return self.module(torch.cat(parts, dim=1), feature_lens=torch.stack(sizes))
        return self.module(torch.cat(parts), grid_thw=torch.stack(sizes))

    @property
    def last(self) -> nn.Module:
        return self.module.layers[-1] if self.modality == Modality.AUDIO else self.module.blocks[-1]

    def statistics(self, *needs: Need, items: slice = slice(None)) -> dict[Need, Tensor]:
        """What the hooks deliver."""
        found: dict[Need, Tensor] = {}
        with ExitStack() as hooks, torch.no_grad():
            install_saliency(self.module, self.module, needs, lambda n, v: found.update({n: v}), hooks)
            self.run(items)
        return found

    def hooks(self) -> int:
        """How many hooks the tower's modules have."""
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.module.modules())


def make_tower(name: str) -> Tower:
    """`qwen2_5_audio`, `qwen2_5_vision`, `qwen2_5_vision_windows` (its last block attends in windows), `qwen3_*`."""
    thinker: Any = tiny_thinker(family=QWEN3 if name.startswith("qwen3") else QWEN2_5)
    # Up to transformers 5.20 the towers hang from the thinker itself.
    towers = thinker.model if hasattr(thinker.model, "visual") else thinker
    module = towers.audio_tower if name.endswith("audio") else towers.visual
    if name.endswith("windows"):
        module.fullatt_block_indexes = [0]
    generator = torch.Generator().manual_seed(3)
    if name.endswith("audio"):
        items = [(torch.randn(MEL_BINS, size, generator=generator), torch.tensor(size)) for size in MEL]
        return Tower(name, module, Modality.AUDIO, tuple(items))
    dim = 3 * 2 * module.patch_size**2
    items = [(torch.randn(t * h * w, dim, generator=generator), torch.tensor([t, h, w])) for t, h, w in GRIDS]
    return Tower(name, module, Modality.VIDEO, tuple(items))


@dataclass(frozen=True)
class EagerBlock:
    """The last block of an eager run: queries and keys [H, N, d] of all positions, weights [H, L, L] per segment."""

    query: Tensor
    key: Tensor
    weights: list[Tensor]
    scaling: float

    def received(self, lengths: list[int]) -> Tensor:
        """[N], attention received within segments of other lengths, by the definition."""
        assert sum(lengths) == self.query.shape[1]
        pieces = zip(self.query.split(lengths, dim=1), self.key.split(lengths, dim=1), strict=True)
        return torch.cat([(q @ k.mT * self.scaling).softmax(-1).mean(0).sum(0) for q, k in pieces])


def eager_block(tower: Tower, patch: pytest.MonkeyPatch) -> EagerBlock:
    """Run `tower` with the stock eager attention and look at its last block."""
    modeling = sys.modules[type(tower.module).__module__]
    original = modeling.eager_attention_forward
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def look(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = original(module, query, key, value, *args, **kwargs)
        seen.append((query[0], key[0], weights[0]))
        return output, weights

    handle = tower.last.register_forward_pre_hook(lambda *_: seen.clear())
    with patch.context() as context, torch.no_grad():
        context.setattr(modeling, "eager_attention_forward", look)
        context.setattr(tower.module.config, "_attn_implementation", "eager")
        tower.run()
    handle.remove()
    query, key, weights = zip(*seen, strict=True)
    attention = tower.last.self_attn if tower.modality == Modality.AUDIO else tower.last.attn
    return EagerBlock(torch.cat(query, dim=1), torch.cat(key, dim=1), list(weights), attention.scaling)


def tokens_of(tower: Tower, values: Tensor) -> Tensor:
    """Bring [N, w] of the last block's positions to tokens [tokens, w] by the tower's own pooling and ordering."""
    audio = tower.modality == Modality.AUDIO
    found: list[Tensor] = []
    with ExitStack() as hooks, torch.no_grad():

        def hook(register: Callable, function: Callable) -> None:
            hooks.callback(register(function).remove)

        if audio:
            wide = torch.nn.functional.pad(values, (0, tower.module.config.d_model - values.shape[1]))
            hook(tower.last.register_forward_hook, lambda *_: (wide,))
            hook(tower.module.ln_post.register_forward_pre_hook, lambda _, args: found.append(args[0]))
            tower.run()
            return found[0][:, : values.shape[1]]
        merged = values.unflatten(0, (-1, tower.module.spatial_merge_unit)).mean(1)
        hook(tower.module.merger.register_forward_hook, lambda *_: merged)
        return tower.run().pooler_output
