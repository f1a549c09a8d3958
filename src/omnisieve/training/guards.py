"""Steps whose loss or gradient is not finite: no rank's parameters change, and the samples are known by name.

Each rank looks at the loss and at its own gradients of every micro-batch, before they are summed over the ranks: after
that nobody can tell whose they were. Then all ranks agree, before the optimiser steps. A step that is left out still
counts: its samples are used up, and the schedule goes on, as if its update had been zero. So the order of samples, the
learning rate and whatever else changes with the steps stay functions of the step alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnisieve.training.distributed import Ranks
from omnisieve.training.errors import TrainingError

LOSS, GRADIENT, SKIPPED = "loss", "norm of the gradient", "what DeepSpeed sums"
_LARGEST = torch.finfo(torch.float32).max / 2**20
"""Of a squared norm. What is below stays finite when a million micro-batches and ranks add to it: under ZeRO-3
DeepSpeed does not notice a norm that is not, and steps with a gradient of zero."""


@dataclass(frozen=True)
class Fault:
    """Why a step is left out: `what` is not finite for these samples of this rank."""

    what: str
    rank: int
    samples: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.what} not finite on rank {self.rank}, samples {', '.join(self.samples)}"


@dataclass(frozen=True)
class Outcome:
    """Of a step, the same on all ranks: `faults` if it was left out; `stop` if a rank was asked to end."""

    faults: tuple[Fault, ...]
    stop: bool


@dataclass(frozen=True)
class _Watched:
    samples: Sequence[str]
    loss: Tensor  # whether it is finite
    gradient: Tensor  # whether its norm is


class StepGuard:
    """Decides for all ranks whether an optimiser step is taken.

    Attributes:
        in_a_row: steps left out since the last that was taken.
        total: steps left out in the whole run.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks, *, limit: int) -> None:
        """Watch gradients; before DeepSpeed does, which takes them away to sum them.

        Args:
            parameters: of which the trainable ones are watched.
            ranks: this process among its peers.
            limit: so many steps left out in a row end the run.
        """
        self.in_a_row = self.total = 0
        self._ranks = ranks
        self._limit = limit
        self._gradient: Tensor | None = None
        self._watched: list[_Watched] = []
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._see)

    def watch(self, samples: Sequence[str], loss: Tensor) -> None:
        """Note a micro-batch after its backward pass; nothing waits for the device."""
        finite = loss.detach().isfinite()
        gradient = torch.zeros_like(loss, dtype=torch.float32) if self._gradient is None else self._gradient
        self._watched.append(_Watched(samples, finite, gradient < _LARGEST))
        self._gradient = None

    def step(self, engine: Any, *, stop: bool) -> Outcome:
        """Take the step of an accumulation window whose micro-batches were watched, or leave it out.

        Args:
            engine: DeepSpeed's.
            stop: whether this rank was asked to end; travels with the ranks' agreement.
        """
        faults = self._local_faults()
        bad, stops = self._ranks.sum([float(bool(faults)), float(stop)])
        skipped = engine.skipped_steps
        with without_update(engine) if bad else nullcontext():
            engine.step()
        if engine.skipped_steps > skipped:
            # DeepSpeed left it out by itself, on all ranks alike, and held the schedule back.
            engine.lr_scheduler.step()
            if not bad:
                faults = [self._fault(SKIPPED, watched) for watched in self._watched]
                bad = True
        self._watched.clear()
        if not bad:
            self.in_a_row = 0
            return Outcome((), stops > 0)
        self.in_a_row += 1
        self.total += 1
        return Outcome(tuple(fault for part in self._ranks.gather(faults) for fault in part), stops > 0)

    def check(self, step: int, faults: Sequence[Fault]) -> None:
        """End a run that does not recover.

        Raises:
            TrainingError: too many steps in a row were left out.
        """
        if faults and self.in_a_row >= self._limit:
            raise TrainingError(
                f"{self.in_a_row} steps in a row were left out (train.max_bad_steps), the last is {step}: "
                f"{'; '.join(map(str, faults))}. No parameter changed in them. Look at these samples; if others are "
                "named each time, lower train.lr or go back to an older checkpoint"
            )

    def state_dict(self) -> dict[str, int]:
        """The counts, as JSON values."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting."""
        self.in_a_row, self.total = state["in_a_row"], state["total"]

    def _see(self, parameter: Tensor) -> None:
        assert parameter.grad is not None  # just accumulated
        squared = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
        self._gradient = squared if self._gradient is None else self._gradient + squared

    def _local_faults(self) -> list[Fault]:
        """Waits for the device once."""
        finite = torch.stack([flag for watched in self._watched for flag in (watched.loss, watched.gradient)]).tolist()
        faults = []
        for watched, loss, gradient in zip(self._watched, finite[::2], finite[1::2], strict=True):
            if not (loss and gradient):
                faults.append(self._fault(GRADIENT if loss else LOSS, watched))
        return faults

    def _fault(self, what: str, watched: _Watched) -> Fault:
        return Fault(what, self._ranks.rank, tuple(watched.samples))


@contextmanager
def without_update(engine: Any) -> Iterator[None]:
    """Inside, `engine.step()` does all but the update: gradients go, parameters and optimiser state stay.

    What DeepSpeed wraps, at every ZeRO stage, is an optimiser of torch; that one does not step. (DeepSpeed itself
    leaves out steps whose gradient is not finite, but not in every version, and not when only the loss is not.)
    """
    optimizer = engine.optimizer.optimizer
    step = optimizer.step
    optimizer.step = lambda *_, **__: None
    try:
        yield
    finally:
        optimizer.step = step
