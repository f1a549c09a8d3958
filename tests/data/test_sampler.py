from __future__ import annotations

import functools
import itertools
import operator
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisieve.data.sampler import StreamSampler


def take(sampler: StreamSampler, batches: int) -> list[list[int]]:
    return list(itertools.islice(sampler, batches))


def stream(size: int, global_batch: int, world_size: int, batches: int, **state: int) -> list[list[int]]:
    """Global batches, put together from all ranks."""
    ranks = [
        StreamSampler(size, global_batch // world_size, seed=5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for sampler in ranks:
        sampler.advance(state.get("skip", 0))
    return [
        functools.reduce(operator.iadd, parts, [])
        for parts in zip(*[take(sampler, batches) for sampler in ranks], strict=True)
    ]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.sampled_from([4, 8]), st.integers(0, 30))
def test_order_does_not_depend_on_the_number_of_ranks(size: int, batch: int, skip: int) -> None:
    expected = stream(size, batch, 1, 12, skip=skip)
    assert stream(size, batch, 2, 12, skip=skip) == expected
    assert stream(size, batch, 4, 12, skip=skip) == expected
    assert stream(size, batch, 1, 12 + skip)[skip:] == expected


def test_every_epoch_shows_every_sample_once_in_another_order() -> None:
    flat = functools.reduce(operator.iadd, take(StreamSampler(10, 3, seed=1), 20), [])
    epochs = [flat[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert all(len(batch) == 3 for batch in take(StreamSampler(10, 3), 20))
    assert flat != functools.reduce(operator.iadd, take(StreamSampler(10, 3, seed=2), 20), [])


def test_resume_continues_where_training_was_not_where_reading_was() -> None:
    whole = take(StreamSampler(7, 2, seed=3), 20)
    sampler = StreamSampler(7, 2, seed=3)
    take(sampler, 9)  # read ahead by workers
    sampler.advance(6)  # trained on
    resumed = StreamSampler(7, 2, seed=3)
    resumed.load_state_dict(sampler.state_dict())
    assert take(resumed, 14) == whole[6:]
    assert resumed.position == 12


def test_resume_with_another_number_of_ranks() -> None:
    whole = stream(11, 8, 1, 10)
    one = StreamSampler(11, 8, seed=5)
    one.advance(4)
    halves = [StreamSampler(11, 4, seed=5, rank=rank, world_size=2) for rank in range(2)]
    for sampler in halves:
        sampler.load_state_dict(one.state_dict())
    assert [a + b for a, b in zip(take(halves[0], 6), take(halves[1], 6), strict=True)] == whole[4:]


def test_resume_far_into_a_run_is_immediate() -> None:
    sampler = StreamSampler(1000, 8)
    sampler.advance(10**12)
    start = time.perf_counter()
    take(sampler, 1)
    assert time.perf_counter() - start < 0.1


def test_state_of_other_data_is_refused() -> None:
    state = StreamSampler(10, 2, seed=1).state_dict()
    with pytest.raises(ValueError, match="seed was 1, now it is 2"):
        StreamSampler(10, 2, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="size was 10, now it is 11"):
        StreamSampler(11, 2, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="rank 2 is not in"):
        StreamSampler(4, 1, rank=2, world_size=2)
