"""Where a run's batches come from."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass

from omnisieve.data.batch import Batch
from omnisieve.data.sampler import StreamSampler


@dataclass(frozen=True)
class Streams:
    """Batches of one rank.

    Attributes:
        train: iterates from the sampler's position, without end.
        sampler: the order of `train`; told by the trainer what has been trained on.
        val: this rank's share of the validation split; None without one. Every rank has as many batches as the
            others; beside a batch stands whether it counts, or only keeps step with the others.
    """

    train: Iterable[Batch]
    sampler: StreamSampler
    val: Iterable[tuple[Batch, bool]] | None = None


def closable(batches: Iterable[Batch]) -> Generator[Batch, None, None]:
    """An iterator whose `close` ends the workers behind it."""
    yield from batches
