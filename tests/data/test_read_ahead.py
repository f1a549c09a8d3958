"""What goes wrong in a worker arrives as what it is; workers are replaced without a trace in the order."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from omnisieve.data.errors import DataError
from omnisieve.data.feature_cache import FeatureCacheError
from omnisieve.data.media import MediaError
from omnisieve.data.read_ahead import ReadAhead


class Numbers(Dataset[int]):
    """0 to 5, but the fourth cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        if index == 3:
            raise self.error
        return index


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error",
    [
        MediaError("a.mp4", "video", "truncated", "the file ends early"),
        FeatureCacheError("a.mp4 is not in the feature cache"),
        DataError("sample 3 cannot be read"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(
    ("options", "before"),
    [({}, [0, 1, 2]), ({"order": [[0, 1], [2, 3], [4, 5]], "collate_fn": sum}, [1])],
    ids=["items", "batches"],
)
def test_errors_arrive_in_order_and_unchanged(workers: int, error: DataError, options: dict, before: list[int]) -> None:
    items = iter(ReadAhead(Numbers(error), num_workers=workers, **options))
    assert [next(items) for _ in before] == before
    with pytest.raises(type(error)) as caught:
        next(items)
    assert str(caught.value) == str(error)


def test_mistakes_of_the_program_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="Traceback"):
        list(ReadAhead(Numbers(ZeroDivisionError("here")), num_workers=1))


class Processes(Dataset[tuple[int, int]]):
    """Any number of items, each with the process that made it."""

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, os.getpid()


class Endless:
    """Batches without end, which count how far they were read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[list[int]]:
        for first in itertools.count(0, 2):
            self.read += 1
            yield [first, first + 1]


def as_they_are(items: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return items


@pytest.mark.parametrize("order", [list(range(13))[::-1], []])
@pytest.mark.parametrize("recycle_after", [0, 1, 3, 100])
def test_every_item_comes_in_order_whichever_worker_reads_it(order: list[int], recycle_after: int) -> None:
    items = list(ReadAhead(Processes(), order, num_workers=2, recycle_after=recycle_after))
    assert [index for index, _ in items] == list(order)
    if 0 < recycle_after < 100 and len(order):
        processes = [process for _, process in items]
        assert max(map(processes.count, processes)) <= recycle_after
        assert os.getpid() not in processes


def test_the_next_workers_start_while_the_last_items_are_being_read() -> None:
    order, others = Endless(), living()
    batches = iter(ReadAhead(Processes(), order, collate_fn=as_they_are, num_workers=2, recycle_after=5))
    met = [next(batches) for _ in range(6)]
    assert [[index for index, _ in batch] for batch in met] == [[2 * i, 2 * i + 1] for i in range(6)]
    assert order.read == 20  # of ten batches four are left, which two workers are on: the next ten are handed out
    assert len(living() - others) == 4
    met += [next(batches) for _ in range(5)]
    assert len(living() - others) == 2
    batches.close()
    assert not living() - others


def living() -> set[str]:
    """Child processes of this one that have not ended."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {child for child in children if "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]}


def test_without_workers_nothing_is_replaced() -> None:
    items = list(ReadAhead(Processes(), range(7), recycle_after=2))
    assert items == [(index, os.getpid()) for index in range(7)]


def test_reading_draws_no_random_number_of_the_process() -> None:
    state = torch.get_rng_state()
    list(ReadAhead(Processes(), range(7), num_workers=2, recycle_after=2))
    assert torch.equal(torch.get_rng_state(), state)
