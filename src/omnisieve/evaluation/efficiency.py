"""What a prompt costs, from the tokens that each layer processes: FLOPs of the prefill and bytes of the KV cache.

Arithmetic on counts, in three conventions whose figures must not be mixed:

- `exact`: 2 FLOPs per multiply-add; real head widths; a query meets its own and earlier keys only; router and active
  experts; the head on the last row.
- `seats`: the cost code of SEATS. 1 FLOP per multiply-add, every query meets every key, the head on all rows that are
  left. Its figures for models with experts take `DecoderShape.as_published`.
- `omnizip`: equation 9 of OmniZip (arXiv 2511.14582, section C), over video and audio tokens alone, with 100 decoded
  tokens, two feed-forward matrices, and keys and values as wide as queries.

None counts encoders, norms, rotary positions, softmax or the selection of tokens; `selector_flops` counts that of
OmniSIFT apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omnisieve.backbones.shape import DecoderShape

OMNIZIP_DECODED = 100
_TERA = 1e12


@dataclass(frozen=True)
class ExactFlops:
    """Matrix products of a prefill, 2 FLOPs per multiply-add; int64 [...] each.

    Attributes:
        linear: projections, feed-forward layers and routers.
        attention: scores and weighted sums over a query's own and earlier keys.
        head: logits of the last row.
        causal_saving: what attention over all keys would add.
    """

    linear: np.ndarray
    attention: np.ndarray
    head: int
    causal_saving: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """All of it, with the causal saving, [...]."""
        return self.linear + self.attention + self.head


def exact_flops(shape: DecoderShape, lengths: np.ndarray) -> ExactFlops:
    """FLOPs of a prefill.

    Args:
        shape: of the decoder.
        lengths: [..., L] tokens, text included, that each layer processes.
    """
    projections = 2 * shape.hidden_size * (shape.attention_width + shape.kv_width)
    feed_forward = 3 * shape.hidden_size * shape.intermediate_size + shape.hidden_size * shape.experts
    pairs = lengths * (lengths + 1) // 2
    return ExactFlops(
        linear=(2 * (projections + feed_forward) * lengths).sum(axis=-1),
        attention=(4 * shape.attention_width * pairs).sum(axis=-1),
        head=2 * shape.hidden_size * shape.vocabulary,
        causal_saving=(4 * shape.attention_width * (lengths**2 - pairs)).sum(axis=-1),
    )


def seats_flops(shape: DecoderShape, lengths: np.ndarray) -> np.ndarray:
    """FLOPs of a prefill as SEATS counts them, int64 [...].

    Args:
        shape: of the decoder.
        lengths: [..., L] tokens, text included, that each layer processes.
    """
    return seats_layer_flops(shape, lengths).sum(axis=-1) + lengths[..., -1] * shape.hidden_size * shape.vocabulary


def seats_layer_flops(shape: DecoderShape, length: np.ndarray) -> np.ndarray:
    """Of single layers over `length` tokens, elementwise."""
    per_token = 2 * shape.hidden_size * (shape.attention_width + shape.kv_width)
    per_token += 3 * shape.hidden_size * shape.intermediate_size + shape.hidden_size * shape.experts
    return per_token * length + 2 * shape.attention_width * length**2


def omnizip_flops(shape: DecoderShape, media: np.ndarray, decoded: int = OMNIZIP_DECODED) -> np.ndarray:
    """FLOPs of prefill and decoding as OmniZip counts them, int64 [...].

    Args:
        shape: of the decoder.
        media: [..., L] video and audio tokens that each layer processes.
        decoded: generated tokens; 0 leaves the prefill, as the cost code of DivPrune has it.
    """
    width = shape.hidden_size
    per_token = 4 * width**2 + 2 * width * shape.intermediate_size
    prefill = per_token * media + 2 * width * media**2
    decoding = decoded * (per_token + 2 * width * media + width * (decoded + 1))
    return (prefill + decoding).sum(axis=-1)


def kv_bytes(shape: DecoderShape, lengths: np.ndarray) -> np.ndarray:
    """Bytes of keys and values, int64 [...].

    Args:
        shape: of the decoder.
        lengths: [..., L] tokens whose keys and values each layer holds.
    """
    return 2 * shape.kv_width * shape.kv_element_size * lengths.sum(axis=-1)


def layer_lengths(layers: int, length: int, drops: Iterable[tuple[int, int]] = ()) -> np.ndarray:
    """Tokens that each layer processes, int64 [L].

    Args:
        layers: L.
        length: tokens at the first layer.
        drops: (layer, tokens that are left after it); layers count from 0.
    """
    lengths = np.full(layers, length)
    for layer, left in sorted(drops):
        lengths[layer + 1 :] = left
    return lengths


def selector_flops(
    video: np.ndarray, audio: np.ndarray, hidden_size: int, width: int, projected: np.ndarray | None = None
) -> np.ndarray:
    """FLOPs of OmniSIFT's audio selector, 2 per multiply-add, int64 [...] (arXiv 2602.04804, table 7).

    Args:
        video, audio: [..., W] video tokens that are attended to, and audio tokens that are scored, of each window.
        hidden_size: D.
        width: of the selector.
        projected: [..., W] video tokens that pass the visual projection; None: those that are attended to.
    """
    projections = ((video if projected is None else projected) + audio) * hidden_size * width
    attention = 2 * (video + audio) * width**2 + 2 * video * audio * width
    scores = audio * (width**2 // 2 + width // 2)
    return 2 * (projections + attention + scores).sum(axis=-1)


@dataclass(frozen=True)
class Prefill:
    """Tokens of N prompts in a decoder of L layers, int64; each prompt counts as if it ran alone, without padding.

    Attributes:
        text: [N] tokens that are never dropped: text and images.
        present: [N] video and audio tokens before compression.
        processed: [N, L] video and audio tokens that each layer processed.
        cached: [N, L] video and audio tokens whose keys and values each layer holds after the prompt.
        selection: [N] FLOPs of the selection; None where nobody counts them.
    """

    text: np.ndarray
    present: np.ndarray
    processed: np.ndarray
    cached: np.ndarray
    selection: np.ndarray | None = None


def summarise(prefills: Sequence[Prefill], shape: DecoderShape) -> dict[str, Any]:
    """Means over prompts, and sums in relation to the same prompts with all tokens, for `report.json`.

    Args:
        prefills: at least one prompt.
        shape: of the decoder.
    """
    text, present, processed, cached = (
        np.concatenate([getattr(p, name) for p in prefills]) for name in ("text", "present", "processed", "cached")
    )
    everything = np.repeat(present[:, None], shape.layers, axis=1)
    costs = _costs(shape, text, processed, cached)
    full = _costs(shape, text, everything, everything)
    memory = costs["kv_bytes"]
    selections = [p.selection for p in prefills if p.selection is not None]
    return {
        "tflops": {name: float(costs[name].mean() / _TERA) for name in ("exact", "seats", "omnizip")},
        "selection_tflops": float(np.concatenate(selections).mean() / _TERA) if selections else None,
        "kv_bytes": float(memory.mean()),
        "of_full": {name: float(costs[name].sum() / full[name].sum()) for name in costs},
        "media_tokens_per_layer": processed.mean(axis=0).round(2).tolist(),
        "layer_retention": float(processed.sum() / everything.sum()) if everything.any() else None,
    }


def _costs(shape: DecoderShape, text: np.ndarray, processed: np.ndarray, cached: np.ndarray) -> dict[str, np.ndarray]:
    """Per prompt, [N] each."""
    lengths = processed + text[:, None]
    return {
        "exact": exact_flops(shape, lengths).total,
        "seats": seats_flops(shape.as_published(), lengths),
        "omnizip": omnizip_flops(shape, processed),
        "kv_bytes": kv_bytes(shape, cached + text[:, None]),
    }
