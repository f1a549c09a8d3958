"""Straight-through gradients for hard selections."""

from __future__ import annotations

import torch
from torch import Tensor

from omnisieve.ops.topk import topk_mask


def straight_through(mask: Tensor, scores: Tensor) -> Tensor:
    """The gate stopgrad(m - s) + s: its value is the hard mask, its gradient that of the score.

    Args:
        mask: [...] bool.
        scores: [...] in (0, 1).

    Returns:
        [...] in the dtype of `scores`; the value is exactly 0 or 1 (OmniSIFT, section 3.4).
    """
    return (mask.to(scores.dtype) - scores).detach() + scores


def sample_candidates(dropped: Tensor, counts: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Choose `counts` of the dropped tokens of each sample uniformly.

    Args:
        dropped: [B, S] bool.
        counts: [B] long, at most the number of dropped tokens.
        generator: a CPU one, so that the choice is the same on every device.

    Returns:
        [B, S] bool.
    """
    noise = torch.rand(dropped.shape, generator=generator, device="cpu").to(dropped.device, non_blocking=True)
    return topk_mask(noise, dropped, counts)
