"""Straight-through gradients for hard selections, and the noise that samples what else they teach."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def straight_through(mask: Tensor, scores: Tensor) -> Tensor:
    """The gate stopgrad(m - s) + s: its value is the hard mask, its gradient that of the score.

    Args:
        mask: [...] bool.
        scores: [...] in (0, 1).

    Returns:
        [...] in the dtype of `scores`; the value is exactly 0 or 1 (OmniSIFT, section 3.4).
    """
    return (mask.to(scores.dtype) - scores).detach() + scores


def token_noise(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Numbers that look random, each a pure function of its key and its place.

    Args:
        keys: uint64, broadcast against `places`.
        places: uint64.

    Returns:
        float32 in [0, 1): the upper bits of what SplitMix64 (Steele et al., OOPSLA 2014) makes of both.
    """
    x = keys * np.uint64(0xD1342543DE82EF95) + (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
