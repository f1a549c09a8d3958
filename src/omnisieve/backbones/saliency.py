"""Statistics of frozen encoders that methods ask for, taken by hooks while the stock encoder runs.

`attention_received` of a token: softmax attention of the encoder's last layer, mean over heads, summed over queries,
averaged over the encoder positions that the tower pools into the token. Its mean over a span is 1.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omnisieve.compressors.base import Need
from omnisieve.layout import Modality

QUERY_BLOCK = 256
# Attention weights held at once (float32), 256 MiB.
MAX_WEIGHTS = 1 << 26

Deliver = Callable[[Need, Tensor], None]


def attention_received(query: Tensor, key: Tensor, lengths: Sequence[int], scaling: float) -> Tensor:
    """Attention that every position receives from its own segment.

    Args:
        query, key: [N, H, d], segments one after another.
        lengths: positions per segment, N in total.
        scaling: of the logits.

    Returns:
        [N] float32, mean over heads and sum over queries; the mean over a segment is 1.
    """
    received = torch.zeros(query.shape[0], device=query.device)
    sizes = np.asarray(lengths)
    starts = np.cumsum(sizes) - sizes
    for size in np.unique(sizes[sizes > 0]):
        index = starts[sizes == size][:, None] + np.arange(size)
        places = torch.from_numpy(index).to(query.device)
        at_once = max(1, MAX_WEIGHTS // (query.shape[1] * min(int(size), QUERY_BLOCK) * int(size)))
        for part in places.split(at_once):
            received[part] = _received_by_equal_segments(query[part], key[part], scaling)
    return received


def _received_by_equal_segments(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """[G, L, H, d] to [G, L]; weights of at most `QUERY_BLOCK` queries exist at a time."""
    keys = key.permute(0, 2, 3, 1).float()
    blocks = query.permute(0, 2, 1, 3).float().split(QUERY_BLOCK, dim=2)
    return torch.stack([(q @ keys * scaling).softmax(dim=-1).mean(dim=1).sum(dim=1) for q in blocks]).sum(dim=0)


class AudioSaliency(threading.local):
    """Hooks of the Qwen2.5-Omni audio tower. What it holds between two hooks belongs to one thread.

    Args:
        needs: audio needs only.
        deliver: called with each need and its values [audio tokens], items in the order of the tower's input.
    """

    def __init__(self, needs: Sequence[Need], deliver: Deliver) -> None:
        self._needs = needs
        self._deliver = deliver
        self._states: Tensor | None = None
        self._segments: Tensor | None = None

    def install(self, tower: Any, hooks: ExitStack) -> None:
        """Register the hooks; closing `hooks` removes them."""
        last: nn.Module = tower.layers[-1].self_attn
        hooks.callback(last.register_forward_pre_hook(self._before_last, with_kwargs=True).remove)
        hooks.callback(tower.register_forward_hook(self._after_tower, with_kwargs=True).remove)

    def _before_last(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._states = args[0] if args else kwargs["hidden_states"]
        self._segments = args[1] if len(args) > 1 else kwargs["cu_seqlens"]

    def _after_tower(self, tower: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        states, segments, self._states, self._segments = self._states, self._segments, None, None
        assert states is not None, "the tower has just run its last layer"
        assert segments is not None
        attention = tower.layers[-1].self_attn
        with torch.no_grad():
            # Through the modules, never their weights, which are empty under ZeRO-3.
            query, key = (
                projection(states).unflatten(-1, (attention.num_heads, -1))
                for projection in (attention.q_proj, attention.k_proj)
            )
            mel_frames = kwargs["feature_lens"].cpu().numpy()
            positions = (mel_frames - 1) // 2 + 1
            for need in self._needs:
                lengths = segments.diff().tolist() if need.span == "encoder" else positions.tolist()
                received = attention_received(query, key, lengths, attention.scaling)
                self._deliver(need, _pool_pairs(received, positions))


def _pool_pairs(values: Tensor, positions: np.ndarray) -> Tensor:
    """Average neighbouring positions of each item as the tower does; an odd last position is left out."""
    starts = np.cumsum(positions) - positions
    first = np.concatenate([start + np.arange(0, n - 1, 2) for start, n in zip(starts, positions, strict=True)])
    index = torch.from_numpy(first).to(values.device)
    return (values[index] + values[index + 1]) / 2


def install_saliency(
    audio_tower: nn.Module, visual: nn.Module, needs: Sequence[Need], deliver: Deliver, hooks: ExitStack
) -> None:
    """Compute `needs` whenever the encoders run, until `hooks` is closed.

    Raises:
        ValueError: a need of another modality than audio.
    """
    for need in needs:
        if need.modality != Modality.AUDIO:
            raise ValueError(f"{need.kind} of {need.modality.name.lower()} tokens is not available for this backbone")
    if needs:
        AudioSaliency(needs, deliver).install(audio_tower, hooks)
