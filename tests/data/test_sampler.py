from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence

import numpy as np
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


@pytest.mark.parametrize("lengths", [None, np.arange(1000)])
def test_resuming_far_into_a_run_looks_at_no_sample_before(
    lengths: np.ndarray | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = 8 * 10**12
    sampler = StreamSampler(1000, 4, world_size=2, lengths=lengths)
    sampler.load_state_dict({**sampler.state_dict(), "position": far})
    looked: list[int] = []
    sample = sampler.sample
    monkeypatch.setattr(sampler, "sample", lambda position: looked.append(position) or sample(position))
    take(sampler, 1)
    assert looked == list(range(far, far + 8))


def test_state_of_other_data_is_refused() -> None:
    state = StreamSampler(10, 2, seed=1).state_dict()
    with pytest.raises(ValueError, match="seed was 1, now it is 2"):
        StreamSampler(10, 2, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"size was 10, now it is 11.*train\.group_by_length"):
        StreamSampler(11, 2, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="there are 3 lengths for 4 samples"):
        StreamSampler(4, 1, lengths=np.ones(3))
    with pytest.raises(ValueError, match="rank 2 is not in"):
        StreamSampler(4, 1, rank=2, world_size=2)


# By length.


def steps(size: int, batch: int, world_size: int, accumulation: int, lengths: np.ndarray | None) -> list[np.ndarray]:
    """Five steps from the second on, [micro-step, rank, batch] samples each."""
    ranks = []
    for rank in range(world_size):
        sampler = StreamSampler(
            size, batch, seed=5, rank=rank, world_size=world_size, accumulation=accumulation, lengths=lengths
        )
        sampler.advance(accumulation)
        ranks.append(np.array(take(sampler, 5 * accumulation)))
    return list(np.stack(ranks, axis=1).reshape(5, accumulation, world_size, batch))


def step_seconds(step: np.ndarray, lengths: np.ndarray) -> int:
    """What a step takes when every forward takes as long as its longest sample, and ranks wait for each other."""
    return int(lengths[step].max(axis=(1, 2)).sum())


def padded(step: np.ndarray, lengths: np.ndarray) -> int:
    """Tokens of a step with padding."""
    return int(lengths[step].max(axis=2).sum() * step.shape[2])


spreads = st.sampled_from([(4, 1, 2), (2, 2, 2), (1, 4, 2), (1, 2, 4), (8, 1, 1), (2, 4, 1), (1, 1, 8)])
all_lengths = st.lists(st.integers(1, 50), min_size=1, max_size=40).map(np.array)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(all_lengths, spreads)
def test_grouping_by_length_leaves_every_step_its_samples(lengths: np.ndarray, spread: Sequence[int]) -> None:
    size = len(lengths)
    plain = steps(size, *spread, lengths=None)
    grouped = steps(size, *spread, lengths=lengths)
    alone = steps(size, 8, 1, 1, lengths=None)
    for one, before, after in zip(alone, plain, grouped, strict=True):
        assert sorted(after.ravel()) == sorted(before.ravel()) == sorted(one.ravel())
        assert padded(after, lengths) <= padded(before, lengths)
        assert step_seconds(after, lengths) <= step_seconds(before, lengths)


def test_ranks_take_the_longest_in_turn() -> None:
    step = steps(16, 2, 2, 4, np.arange(16))[0]
    np.testing.assert_array_equal(step[0], [[15, 14], [13, 12]])
    np.testing.assert_array_equal(step[1], [[9, 8], [11, 10]])
    assert abs(step.sum(axis=(0, 2)) @ [1, -1]) == 0


def test_the_grouped_order_resumes_only_with_the_same_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 23)
    options = {"seed": 3, "accumulation": 2, "lengths": lengths}
    whole = take(StreamSampler(23, 2, **options), 20)
    sampler = StreamSampler(23, 2, **options)
    take(sampler, 9)
    sampler.advance(6)
    resumed = StreamSampler(23, 2, **options)
    resumed.load_state_dict(sampler.state_dict())
    assert take(resumed, 14) == whole[6:]
    for other in (None, lengths + 1):
        with pytest.raises(ValueError, match="lengths was"):
            StreamSampler(23, 2, **options | {"lengths": other}).load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="lengths was None"):
        resumed.load_state_dict(StreamSampler(23, 2, seed=3).state_dict())
