"""Statistics of frozen encoders that methods ask for, taken by hooks while the stock encoders run.

A hook on the attention of the last block keeps what goes in; when the tower has run, queries and keys are computed
again from it, and from them what `compressors.base.Need` defines.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from omnisieve.backbones.last_block import Call, last_attention, last_block
from omnisieve.compressors.base import Need
from omnisieve.layout import Modality

Deliver = Callable[[Need, Tensor], None]


class Saliency(threading.local):
    """Hooks of one tower. What it holds between two hooks belongs to one thread.

    Args:
        modality: of the tower; video stands for images as well.
        needs: of this modality.
        deliver: called with each need and its values [tokens, ...], items in the order of the tower's input.
    """

    def __init__(self, modality: Modality, needs: Sequence[Need], deliver: Deliver) -> None:
        self._modality = modality
        self._needs = needs
        self._deliver = deliver
        self._seen: tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None] | None = None

    def install(self, tower: nn.Module, hooks: ExitStack) -> None:
        """Register the hooks; closing `hooks` removes them."""
        last = last_attention(tower, self._modality)
        hooks.callback(last.register_forward_pre_hook(self._before_last, with_kwargs=True).remove)
        hooks.callback(tower.register_forward_hook(self._after_tower, with_kwargs=True).remove)

    def _before_last(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(("hidden_states", "cu_seqlens", "position_embeddings"), args, strict=False)) | kwargs
        self._seen = given["hidden_states"], given["cu_seqlens"], given.get("position_embeddings")

    def _after_tower(self, tower: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        seen, self._seen = self._seen, None
        assert seen is not None, "the tower has just run its last block"
        name = "feature_lens" if self._modality == Modality.AUDIO else "grid_thw"
        sizes = kwargs[name] if name in kwargs else args[1]
        with torch.no_grad():
            block = last_block(tower, self._modality, Call(*seen, sizes.cpu().numpy()))
            for need in self._needs:
                self._deliver(need, block.statistic(need))


def install_saliency(
    audio_tower: nn.Module, visual: nn.Module, needs: Sequence[Need], deliver: Deliver, hooks: ExitStack
) -> None:
    """Compute `needs` whenever the encoders run, until `hooks` is closed; a tower that nobody needs gets no hook.

    Video statistics are delivered for images, too, if the tower runs on images. Stock models encode them before the
    videos, so the last values delivered in a forward with videos are the videos'.
    """
    for modality, tower in ((Modality.AUDIO, audio_tower), (Modality.VIDEO, visual)):
        own = [need for need in needs if need.modality == modality]
        if own:
            Saliency(modality, own, deliver).install(tower, hooks)
