"""The order of training samples: a pure function of seed and position, whatever the number of ranks.

With lengths, samples change places inside their optimiser step only. Sorted by length, they are cut into micro-steps,
and each of these into the batches of the ranks: no other order leaves less padding in the batches, or shorter
micro-steps, each of which takes as long as its longest batch. The longest of a micro-step go to the first rank and to
the last in turn. Which samples a step sees stays the same, and with it its gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler


class StreamSampler(Sampler[list[int]]):
    """Endless batches of constant size; a batch sampler for `DataLoader`.

    Position p of the stream is sample `order(seed, p // n)[p % n]`, one permutation per epoch. Global batch b is the
    positions [b * world * batch, (b + 1) * world * batch), split over the ranks in order, so runs of 1, 2 and 4
    ranks with the same global batch see the same samples at each step. Batches run across the end of an epoch:
    nothing is left out or shown twice. Resuming is arithmetic: the state is the position.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        lengths: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            size: samples in the data set.
            batch_size: samples per rank and batch.
            seed: of the order.
            rank, world_size: this process's place.
            accumulation: batches of a rank in one optimiser step; of no consequence without `lengths`.
            lengths: of all samples, [size]; those of a step are grouped by them.
        """
        if size < 1 or batch_size < 1:
            raise ValueError(f"size and batch_size must be at least 1, got {size} and {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, {world_size})")
        if lengths is not None and len(lengths) != size:
            raise ValueError(f"there are {len(lengths)} lengths for {size} samples")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        self.lengths = lengths
        self.position = 0
        self._order: tuple[int, np.ndarray] | None = None

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of this rank from `position` on. Reading ahead does not move `position`; `advance` does."""
        first, window = self.position, self.accumulation * self.world_size * self.batch_size
        while True:
            yield from self._share([self.sample(p) for p in range(first, first + window)])
            first += window

    def _share(self, samples: Sequence[int]) -> Iterator[list[int]]:
        """This rank's batches of the samples of one step."""
        lengths = self.lengths
        if lengths is not None:
            # The longest first: what does not fit into memory fails at once, and what does leaves room for the others.
            samples = sorted(samples, key=lambda sample: lengths[sample], reverse=True)
        for micro_step in range(self.accumulation):
            turned = lengths is not None and micro_step % 2
            place = self.world_size - 1 - self.rank if turned else self.rank
            first = (micro_step * self.world_size + place) * self.batch_size
            yield list(samples[first : first + self.batch_size])

    def sample(self, position: int) -> int:
        """The sample at a position of the stream."""
        epoch, index = divmod(position, self.size)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.size)
        return int(self._order[1][index])

    def advance(self, batches: int = 1) -> None:
        """Count batches that every rank has trained on; the next state and iterator start behind them."""
        self.position += batches * self.batch_size * self.world_size

    def state_dict(self) -> dict[str, Any]:
        """Position, and what it refers to. The same on all ranks."""
        return {"position": self.position, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        lengths = None if self.lengths is None else hashlib.sha256(self.lengths.tobytes()).hexdigest()
        return {"seed": self.seed, "size": self.size, "lengths": lengths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position, also with another batch size or number of ranks.

        Raises:
            ValueError: the state belongs to another seed, another data set or other lengths.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"cannot resume the data order: {name} was {state.get(name)}, now it is {value}; "
                    "use the same data, seed and train.group_by_length, or start a new run"
                )
        self.position = int(state["position"])
