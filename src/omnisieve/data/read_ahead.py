"""Reading in worker processes, whose errors arrive as what they are, and which do not live forever.

torch passes an error of a worker on as text with a traceback in it, and some as another type. What a user can cure
travels as a value instead, and is raised where the items are read. What libraries leak in a worker is given back when
it ends: after a number of items all workers are replaced, the next ones starting while the last items of these are
still being read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from omnisieve.data.errors import DataError

Item = TypeVar("Item")

# Items that each worker works on ahead of the reader.
_AHEAD = 2


class ReadAhead(Generic[Item]):
    """Items or batches of a data set in a given order; raises a worker's `DataError` itself."""

    def __init__(
        self,
        dataset: Dataset[Any],
        order: Iterable[Any] | None = None,
        *,
        collate_fn: Callable[[Sequence[Any]], Item] | None = None,
        num_workers: int = 0,
        recycle_after: int = 0,
        **options: Any,
    ) -> None:
        """
        Args:
            dataset: map-style.
            order: what to read, also without end: indices, or with `collate_fn` lists of them; None: every item once.
            collate_fn: items to a batch; None: items come as they are.
            num_workers: processes; 0 reads in this one.
            recycle_after: items or batches after which a worker is replaced; 0: never.
            **options: of the `DataLoader`.
        """
        self._order: Iterable[Any] = range(len(dataset)) if order is None else order  # type: ignore[arg-type]
        self._dataset = _Guarded(dataset)
        # With a generator of its own a loader draws nothing from the process's.
        self._options: dict[str, Any] = {**options, "num_workers": num_workers, "generator": torch.Generator()}
        if num_workers:
            self._options["prefetch_factor"] = _AHEAD
        self._options["collate_fn"] = _as_it_is if collate_fn is None else partial(_collate, collate_fn)
        self._batched = collate_fn is not None
        self._in_work = _AHEAD * num_workers
        self._shift = recycle_after * num_workers

    def __iter__(self) -> Iterator[Item]:
        """Items or batches in order; raises the first `DataError` in its place."""
        order = iter(self._order)
        items, following = None, self._start(order)
        try:
            while following is not None:
                (items, left), following = following, None
                for item in items:
                    if isinstance(item, DataError):
                        raise item
                    left -= 1
                    # From here on the workers have nothing new to begin.
                    if left <= self._in_work and following is None:
                        following = self._start(order)
                    yield item
        finally:
            # An error that is kept keeps this frame; workers end at once only if nothing keeps their loader.
            items = following = None

    def _start(self, order: Iterator[Any]) -> tuple[Iterator[Any], float] | None:
        """Start workers on the next part of the order, of so many items; None: there is nothing left."""
        if not self._shift:
            return iter(self._loader(order)), math.inf
        part = list(islice(order, self._shift))
        return (iter(self._loader(part)), len(part)) if part else None

    def _loader(self, part: Iterable[Any]) -> DataLoader[Any]:
        if self._batched:
            return DataLoader(self._dataset, batch_sampler=part, **self._options)
        return DataLoader(self._dataset, sampler=part, batch_size=None, **self._options)


class _Guarded(Dataset[Any]):
    """A data set whose errors are items."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except DataError as error:
            return error


def _collate(collate_fn: Callable[[Sequence[Any]], Any], items: Sequence[Any]) -> Any:
    failed = next((item for item in items if isinstance(item, DataError)), None)
    return collate_fn(items) if failed is None else failed


def _as_it_is(item: Any) -> Any:
    return item
