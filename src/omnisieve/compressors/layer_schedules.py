"""How many media tokens each decoder layer processes: the schedules of SEATS and OmniDrop, on the host.

Layers are 1-based in SEATS' transition layers, as in the paper, and 0-based in everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from omnisieve.ops.budget import round_count

Transitions = tuple[int, int, int, int]
FRACTIONS = tuple(layer / 28 for layer in (16, 19, 21, 24))
TINY = 1e-12
PUBLISHED_TRANSITIONS: dict[int, Transitions] = {28: (16, 19, 21, 24), 48: (27, 32, 36, 40)}
"""L_s, L_m1, L_m2 and L_l of SEATS by depth (section 5.1)."""


def transitions(num_layers: int) -> Transitions:
    """L_s, L_m1, L_m2, L_l: published, or at the same fractions of the depth, strictly increasing and at most L.

    Three layers have room for three of them: the third level stays empty.

    Raises:
        ValueError: there are fewer.
    """
    if num_layers < 3:
        raise ValueError(f"the levels of the schedule need at least 3 decoder layers, the model has {num_layers}")
    if num_layers in PUBLISHED_TRANSITIONS:
        return PUBLISHED_TRANSITIONS[num_layers]
    layers = [round(num_layers * fraction) for fraction in FRACTIONS]
    for i in range(1, 4):
        layers[i] = max(layers[i], layers[i - 1] + 1)
    room = [(min(i + 1, num_layers), num_layers - 3 + i) for i in range(4)]
    start, middle, deep, late = (
        max(min(layer, last), first) for layer, (first, last) in zip(layers, room, strict=True)
    )
    return start, middle, deep, late


@dataclass(frozen=True)
class BlockDecay:
    """SEATS' block-wise decay (section 4.2.1): r_s = lambda R, then three levels, each lower by more, then nothing.

    Attributes:
        num_layers: L.
        at: L_s, L_m1, L_m2, L_l.
        late_removal: whether layers from L_l on see no media token; else the third level lasts to the end.
        steps: "exp": a level falls by e times as much as the one before; "equal": by as much.
    """

    num_layers: int
    at: Transitions
    late_removal: bool = True
    steps: Literal["exp", "equal"] = "exp"

    @cached_property
    def spans(self) -> np.ndarray:
        """Layers at each of the four levels, [4]; the second may have none."""
        start, middle, deep, late = self.at
        end = late if self.late_removal else self.num_layers + 1
        return np.diff([1, start + 1, middle, deep, end])

    @property
    def used(self) -> list[int]:
        """Levels that have layers."""
        return [level for level, span in enumerate(self.spans) if span]

    @property
    def cuts(self) -> list[int]:
        """0-based layers after which a used level ends; behind the last one nothing is left, or no layer follows."""
        ends = self.spans.cumsum()[self.used] - 1
        return ends.tolist() if self.late_removal else ends[:-1].tolist()

    @cached_property
    def falls(self) -> np.ndarray:
        """How far each level is below the first, in units of delta, [4]."""
        base = np.e if self.steps == "exp" else 1.0
        return np.cumsum([0.0, 1.0, base, base**2])

    @property
    def feasible(self) -> tuple[float, float]:
        """The lambdas that need no rise (delta >= 0) and leave no level below nothing."""
        layers, lost, deepest = self.spans.sum(), self.spans @ self.falls, self.falls[self.used[-1]]
        return float(self.num_layers / layers), float(self.num_layers * deepest / (layers * deepest - lost))

    def delta(self, lambda_: float) -> float:
        """delta / R in closed form: the mean over all L layers is R. Of a lambda that is not feasible the nearest."""
        delta = (self.spans.sum() * lambda_ - self.num_layers) / (self.spans @ self.falls)
        return float(np.clip(delta, 0, lambda_ / self.falls[self.used[-1]]))

    def levels(self, lambda_: float) -> np.ndarray:
        """The four retained ratios in units of R, [4]."""
        return lambda_ - self.delta(lambda_) * self.falls

    def keep_ratios(self, lambda_: float) -> list[float]:
        """What is left from one used level to the next, to four decimals, as the published code computes it."""
        levels = self.levels(lambda_)[self.used]
        return np.round(levels[1:] / levels[:-1], 4).tolist()

    def fit(self, first: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """Integer counts at the four levels whose mean over layers is `asked`, as nearly as integers allow.

        What a level misses by rounding is spread over the layers after it, so that the sum over layers is off by at
        most half the layers of the last level; by more only where a bound holds: no level rises, and of what enters
        the LLM one token reaches the last level.

        Args:
            first: [B] tokens that enter the LLM.
            asked: [B] mean over all layers.

        Returns:
            [4, B] int64; the first row is `first`.
        """
        lost = first * self.spans.sum() - asked * self.num_layers
        ideal = first - np.outer(self.falls, lost / (self.spans @ self.falls))
        least, counts = np.minimum(first, 1), [first]
        missing = asked * self.num_layers - self.spans[0] * first
        for level in range(1, 4):
            here, behind = self.spans[level], self.spans[level + 1 :].sum()
            spread = (missing - self.spans[level:] @ ideal[level:]) / max(here + behind, 1)
            most = counts[-1]
            if behind and here:
                # Each layer behind needs one token.
                most = np.clip((missing - behind * least) // here, least, most)
            counts.append(np.clip(round_count(ideal[level] + spread), least, most))
            missing = missing - here * counts[-1]
        return np.stack(counts)


@dataclass(frozen=True)
class ProgressivePruning:
    """OmniDrop's schedule (section 3.1): after layer l of 0 to L - 2 the share p_l of what it processed is pruned.

    Attributes:
        num_layers: L.
        beta, t_mid: slope and midpoint of the sigmoid, over the depth scaled to [0, 1].
        shape: "sigmoid", or "exponential": p_init (p_final / p_init)^(l / (L - 2)), which needs p_init > 0.
    """

    num_layers: int
    beta: float = 20.0
    t_mid: float = 0.5
    shape: Literal["sigmoid", "exponential"] = "sigmoid"

    def rates(self, p_init: np.ndarray | float, p_final: np.ndarray | float) -> np.ndarray:
        """p_l, [..., L - 1], from the shares pruned at the ends, [...] each."""
        first, last = (np.asarray(p, dtype=np.float64)[..., None] for p in (p_init, p_final))
        depth = np.arange(self.num_layers - 1) / max(self.num_layers - 2, 1)
        if self.shape == "exponential":
            return first * (last / first) ** depth
        return first + (last - first) / (1 + np.exp(-self.beta * (depth - self.t_mid)))

    def retention(self, p_init: np.ndarray | float, p_final: np.ndarray | float) -> np.ndarray:
        """r_l / r_0, [..., L]: what each layer processes of what enters the LLM."""
        left = np.cumprod(1 - self.rates(p_init, p_final), axis=-1)
        return np.concatenate([np.ones_like(left[..., :1]), left], axis=-1)

    def solve(self, mean: np.ndarray, p_init: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """p_init and p_final, [B] each, that retain `mean` [B] on average over layers.

        Unless it is given, p_init is 0.02 where the mean is below 0.6, else 0; of the exponential schedule, which
        cannot start at 0, it falls to nothing as the mean rises to 1. Where even p_final = 1 retains too much, p_init
        rises, as the paper suggests for extreme pruning. What a given p_init leaves out of reach is approached.
        """
        gentle = np.where(mean < 0.6, 0.02, 0.0)
        if self.shape == "exponential":
            gentle = np.clip(0.02 * (1 - mean) / 0.4, TINY, 0.02)
        start = np.broadcast_to(np.asarray(gentle if p_init is None else p_init, dtype=np.float64), mean.shape)
        end = _fall_to(mean, lambda p: self.retention(start, p).mean(axis=-1), np.full(mean.shape, TINY))
        extreme = self.retention(start, end).mean(axis=-1) > mean + 1e-9
        raised = _fall_to(mean, lambda p: self.retention(p, np.ones(mean.shape)).mean(axis=-1), start)
        return np.where(extreme, raised, start), end


def _fall_to(target: np.ndarray, function: Callable[[np.ndarray], np.ndarray], low: np.ndarray) -> np.ndarray:
    """Where a falling function meets its target between `low` and 1, [B]; the nearer end where it does not."""
    high = np.ones_like(low)
    for _ in range(60):
        middle = (low + high) / 2
        above = function(middle) > target
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return (low + high) / 2
