"""What a prompt's forward did, as counts: how many tokens each layer saw, and what selecting them cost."""

from __future__ import annotations

import numpy as np

from omnisieve.compressors import Compressor
from omnisieve.compressors.inner import InnerCompressor
from omnisieve.compressors.omnisift import OmniSift
from omnisieve.evaluation.efficiency import Prefill, selector_flops
from omnisieve.layout import MEDIA, Modality, TokenLayout
from omnisieve.plan import Plan


def prefill(compressor: Compressor, plan: Plan, layout: TokenLayout, kept: np.ndarray) -> Prefill:
    """The counts of a batch of prompts.

    Args:
        compressor: that compressed them.
        plan: of what enters the LLM.
        layout: of the batch.
        kept: [L, B, 2] video and audio tokens that each layer processed, see `Attachment.layer_counts`.
    """
    processed = kept.sum(axis=-1).T
    cached = processed
    if isinstance(compressor, InnerCompressor) and compressor.settings.kv_policy == "prune_all_layers":
        cached = np.repeat(processed[:, -1:], processed.shape[1], axis=1)
    return Prefill(
        text=layout.counts(Modality.TEXT, Modality.IMAGE),
        present=layout.counts(*MEDIA),
        processed=processed,
        cached=cached,
        selection=selection_flops(compressor, plan, layout),
    )


def selection_flops(compressor: Compressor, plan: Plan, layout: TokenLayout) -> np.ndarray | None:
    """FLOPs of OmniSIFT's trained modules per sample, int64 [B]; None for other methods, whose cost is not counted."""
    if not isinstance(compressor, OmniSift):
        return None
    video, audio = (layout.segments("window", modality).sizes for modality in MEDIA)
    attended = _kept_by_window(plan.keep.cpu().numpy() & (layout.modality == Modality.VIDEO), layout, video.shape[1])
    sizes = (audio, compressor.hidden_size, compressor.settings.width)
    if compressor.pruner is None:
        return selector_flops(attended, *sizes)
    # The learned pruner reads the projection of every video token, and passes each weight of its CNN once per token.
    weights = sum(weight.numel() for weight in compressor.pruner.cnn.parameters() if weight.dim() > 1)
    return selector_flops(attended, *sizes, projected=video) + 2 * weights * video.sum(axis=1)


def _kept_by_window(keep: np.ndarray, layout: TokenLayout, windows: int) -> np.ndarray:
    """Tokens of `keep` [B, S] in each window, [B, W]."""
    sample, position = np.nonzero(keep)
    key = sample * windows + layout.window[sample, position]
    return np.bincount(key, minlength=layout.batch_size * windows).reshape(-1, windows)
