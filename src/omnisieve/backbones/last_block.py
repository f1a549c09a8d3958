"""What the last block of an encoder attends with: the code that knows the towers of Qwen2.5-Omni and Qwen3-Omni.

Positions are mel frames after the convolutions, or patches. The audio tower of Qwen2.5-Omni averages pairs of them to
one token, that of Qwen3-Omni none; both vision towers merge four patches. The vision tower of Qwen2.5-Omni brings the
patches of a frame into the order of its attention windows and its output back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnisieve.compressors.base import Need, Span
from omnisieve.layout import Modality
from omnisieve.ops.segment_attention import attention_received, mean_query_attention

MEL_FRAMES_PER_SECOND = 100
SECONDS_PER_WINDOW = 2
FRAMES_PER_WINDOW = 2


@dataclass(frozen=True)
class Call:
    """What hooks saw of one call of a tower.

    Attributes:
        states: [N, D] input of the last block's attention.
        segments: boundaries of the segments that attend, [G + 1].
        rotary: cosines and sines [N, d]; None of audio.
        sizes: mel frames per item, [I], or (t, h, w) in patches, [I, 3], on the host.
    """

    states: Tensor
    segments: Tensor
    rotary: tuple[Tensor, Tensor] | None
    sizes: np.ndarray


@dataclass(frozen=True)
class LastBlock:
    """Queries and keys of an encoder's last block and what belongs together.

    Attributes:
        query, key: [N, H, d], one per position, in the order of the block.
        scaling: of the logits.
        spans: positions per segment, N in total, of each span.
        unit: neighbouring positions that make one token.
        pool: from [N, ...] to tokens in the order of the tower's output, the mean over the positions of each.
    """

    query: Tensor
    key: Tensor
    scaling: float
    spans: Mapping[Span, np.ndarray]
    unit: int
    pool: Callable[[Tensor], Tensor]

    def statistic(self, need: Need) -> Tensor:
        """[tokens] or, of keys, [tokens, d]; float32. See `Need`."""
        if need.kind == "keys":
            return self.pool(self.key.float().mean(dim=1))
        lengths = self.spans[need.span]
        if need.kind == "mean_query_attention":
            return self.pool(mean_query_attention(self.query, self.key, lengths, self.scaling, self.unit))
        return self.pool(attention_received(self.query, self.key, lengths, self.scaling))


def last_attention(tower: Any, modality: Modality) -> Any:
    """The attention module of a tower's last block."""
    return tower.layers[-1].self_attn if modality == Modality.AUDIO else tower.blocks[-1].attn


def last_block(tower: Any, modality: Modality, call: Call) -> LastBlock:
    """Recompute queries and keys through the modules, never their weights, which are empty under ZeRO-3."""
    return (_audio if modality == Modality.AUDIO else _vision)(tower, call)


def _audio(tower: Any, call: Call) -> LastBlock:
    attention = last_attention(tower, Modality.AUDIO)
    query, key = (
        projection(call.states).unflatten(-1, (attention.num_heads, -1))
        for projection in (attention.q_proj, attention.k_proj)
    )
    paired = hasattr(tower, "avg_pooler")
    count = _halved if paired else _positions_by_second
    positions = count(call.sizes)
    window = int(count(np.array(SECONDS_PER_WINDOW * MEL_FRAMES_PER_SECOND)))
    spans: dict[Span, np.ndarray] = {
        "encoder": call.segments.diff().cpu().numpy(),
        "window": _cut(positions, window),
        "global": positions,
    }
    pool = (lambda values: _mean_of_pairs(values, positions)) if paired else (lambda values: values)
    return LastBlock(query, key, attention.scaling, spans, 2 if paired else 1, pool)


def _halved(frames: np.ndarray) -> np.ndarray:
    """Length after a convolution of stride 2; 0 stays 0."""
    return (frames - 1) // 2 + 1


def _positions_by_second(mel_frames: np.ndarray) -> np.ndarray:
    """Qwen3-Omni convolves every second on its own, three times with stride 2: 13 positions each."""
    seconds, rest = np.divmod(mel_frames, MEL_FRAMES_PER_SECOND)
    full, tail = (_halved(_halved(_halved(frames))) for frames in (np.array(MEL_FRAMES_PER_SECOND), rest))
    return seconds * full + tail


def _mean_of_pairs(values: Tensor, positions: np.ndarray) -> Tensor:
    """Average neighbouring positions of each item as the tower does; an odd last position is left out."""
    pairs = positions // 2
    skipped = np.cumsum(positions - 2 * pairs) - (positions - 2 * pairs)
    first = 2 * np.arange(pairs.sum()) + np.repeat(skipped, pairs)
    index = torch.from_numpy(first).to(values.device)
    return (values[index] + values[index + 1]) / 2


def _vision(tower: Any, call: Call) -> LastBlock:
    attention = last_attention(tower, Modality.VIDEO)
    assert call.rotary is not None
    query, key = (_rotate(x, *call.rotary) for x in _vision_projections(attention, call.states))
    frames, height, width = call.sizes.T
    patches = height * width
    windows = -(-frames // FRAMES_PER_WINDOW)
    spans: dict[Span, np.ndarray] = {
        "encoder": call.segments.diff().cpu().numpy(),
        "frame": np.repeat(patches, frames),
        "window": np.repeat(patches, windows) * _cut(frames, FRAMES_PER_WINDOW),
        "global": frames * patches,
    }
    unit = tower.spatial_merge_unit
    # Only the tower of Qwen2.5-Omni has windows.
    side = getattr(tower, "window_size", 0) // tower.spatial_merge_size // tower.patch_size
    order = _places_in_windows(call.sizes, tower.spatial_merge_size, side) if side else None

    def pool(values: Tensor) -> Tensor:
        tokens = values.unflatten(0, (-1, unit)).mean(dim=1)
        return tokens if order is None else tokens[torch.from_numpy(order).to(tokens.device)]

    return LastBlock(query, key, attention.scaling, spans, unit, pool)


def _vision_projections(attention: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [N, H, d] before the rotary embedding."""
    if hasattr(attention, "qkv"):
        query, key, _ = attention.qkv(states).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    else:
        query, key = (p(states).unflatten(-1, (attention.num_heads, -1)) for p in (attention.q, attention.k))
    return query, key


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of [N, H, d] in float32, rounded to the dtype of `x` as the block does."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cosine.unsqueeze(1).float() + turned * sine.unsqueeze(1).float()).to(x.dtype)


def _places_in_windows(grids: np.ndarray, merge: int, side: int) -> np.ndarray:
    """Where each token, in the order of the tower's output, lies in the order of the attention windows.

    Args:
        grids: [I, 3] (t, h, w) in patches.
        merge: patches per token and side.
        side: tokens per window and side; windows at the edges are smaller.
    """
    frames, rows, columns = grids.T // np.array([[1], [merge], [merge]])
    counts = frames * rows * columns
    item = np.repeat(np.arange(len(grids)), counts)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    frame, place = np.divmod(place, (rows * columns)[item])
    row, column = np.divmod(place, columns[item])
    # Last key first; the sort is stable, so tokens of one window keep their order.
    window_order = np.lexsort((column // side, row // side, frame, item))
    return np.argsort(window_order)


def _cut(lengths: np.ndarray, size: int) -> np.ndarray:
    """Lengths of the pieces of `size` that items are cut into, the last piece of an item may be shorter."""
    pieces = -(-lengths // size)
    out = np.full(pieces.sum(), size)
    last = np.cumsum(pieces)[pieces > 0] - 1
    out[last] = (lengths - (pieces - 1) * size)[pieces > 0]
    return out
