"""What changes from step to step and depends on nothing but the step and the seed."""

from __future__ import annotations

import math

import numpy as np


def warmup_cosine(step: int, *, total: int, warmup: int, floor: float) -> float:
    """Factor of the peak learning rate at `step`, counted from 0.

    Rises linearly over `warmup` steps, the last of which has the peak, then falls as a half cosine to `floor`,
    which the last of the `total` steps has.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step + 1 - warmup) / max(total - warmup, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def draw_ratio(seed: int, step: int, low: float, high: float) -> float:
    """The retained ratio of an elastic run at `step`, the same on every rank and after a resume."""
    return float(np.random.default_rng([seed, step]).uniform(low, high))


def draw_seed(seed: int, step: int) -> int:
    """Seed of what is random for a sample in one step, such as the choice of candidates."""
    return int(np.random.default_rng([seed, step]).integers(2**62))
