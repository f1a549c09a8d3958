"""Reading in worker processes, whose errors arrive as what they are.

torch passes an error of a worker on as text with a traceback in it, and some as another type. What a user can cure
travels as a value instead, and is raised where the items are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from omnisieve.data.errors import DataError

Item = TypeVar("Item")


class ReadAhead(Generic[Item]):
    """A `DataLoader` that raises a worker's `DataError` itself."""

    def __init__(
        self, dataset: Dataset[Any], *, collate_fn: Callable[[Sequence[Any]], Item] | None = None, **options: Any
    ) -> None:
        """
        Args:
            dataset: map-style.
            collate_fn: items to a batch; None together with `batch_size=None`: items come as they are.
            **options: of the `DataLoader`.
        """
        if collate_fn is not None:
            options["collate_fn"] = partial(_collate, collate_fn)
        self._loader: DataLoader[Any] = DataLoader(_Guarded(dataset), **options)

    def __iter__(self) -> Iterator[Item]:
        """Items or batches in order; raises the first `DataError` in its place."""
        for item in self._loader:
            if isinstance(item, DataError):
                raise item
            yield item


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
