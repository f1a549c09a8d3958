"""The order of training samples: a pure function of seed and position, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
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

    def __init__(self, size: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        """
        Args:
            size: samples in the data set.
            batch_size: samples per rank and batch.
            seed: of the order.
            rank, world_size: this process's place.
        """
        if size < 1 or batch_size < 1:
            raise ValueError(f"size and batch_size must be at least 1, got {size} and {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, {world_size})")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.position = 0
        self._order: tuple[int, np.ndarray] | None = None

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of this rank from `position` on. Reading ahead does not move `position`; `advance` does."""
        first = self.position + self.rank * self.batch_size
        while True:
            yield [self.sample(p) for p in range(first, first + self.batch_size)]
            first += self.world_size * self.batch_size

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
        return {"position": self.position, "seed": self.seed, "size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position, also with another batch size or number of ranks.

        Raises:
            ValueError: the state belongs to another seed or another data set.
        """
        for name in ("seed", "size"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"cannot resume the data order: {name} was {state[name]}, now it is {getattr(self, name)}; "
                    "use the same data and seed, or start a new run"
                )
        self.position = int(state["position"])
