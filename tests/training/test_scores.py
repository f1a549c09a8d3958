"""Distributions of scores: counted on the device, summed over ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisieve.layout import Modality, TokenLayout, TokenMap
from omnisieve.training.scores import BUCKETS, EDGES, QUANTILES, Distribution, ScoreMeter, moments
from tests.training.runs import Alone
from tests.waiting import NoWaiting


class Summing(Alone):
    """Ranks of which all the others have the same as this one."""

    def sum(self, values: list[float]) -> list[float]:
        return [2 * value for value in values]


def layout_of(*modalities: list[Modality]) -> TokenLayout:
    maps = []
    for row in modalities:
        zeros = np.zeros(len(row), dtype=np.int64)
        maps.append(TokenMap(np.array(row, dtype=np.int64), *[zeros] * 6))
    return TokenLayout.stack(maps)


def distribution(values: np.ndarray) -> Distribution:
    scores = torch.from_numpy(values)[None]
    sums = moments(scores, torch.ones_like(scores, dtype=torch.bool)).numpy()
    return Distribution(sums[2:], sums[0], sums[1])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60), st.sampled_from([1.0, 1e-4]))
def test_quantiles_are_exact_to_a_bucket(numbers: list[float], scale: float):
    values = np.array(numbers) * scale
    found = distribution(values)
    assert found.counts.sum() == len(values)
    summary = found.summary()
    assert summary["mean"] == pytest.approx(values.mean(), rel=1e-6, abs=1e-9)
    assert summary["std"] == pytest.approx(values.std(), rel=1e-3, abs=1e-3 * float(np.abs(values).max()))
    for q in QUANTILES:
        # A quantile lies in the bucket of one of the scores that enclose it.
        low, high = (np.quantile(values, q / 100, method=m) for m in ("lower", "higher"))
        edges = [np.searchsorted(EDGES, edge) for edge in (low, high)]
        below, above = EDGES[max(edges[0] - 2, 0)], EDGES[min(edges[1] + 1, BUCKETS)]
        assert below <= summary[f"p{q}"] <= above


def test_scores_between_0_and_1_have_fine_buckets():
    inside = EDGES[(EDGES >= 0) & (EDGES <= 1)]
    assert np.diff(inside).max() < 0.004


def test_only_tokens_of_a_modality_count_and_ranks_are_summed():
    video, audio, text = Modality.VIDEO, Modality.AUDIO, Modality.TEXT
    layout = layout_of([video, text, video], [audio, video])  # the second row is padded
    meter = ScoreMeter(Summing())
    scores = torch.tensor([[0.2, 9.0, 0.4], [0.7, 0.6, 9.0]])
    for _ in range(2):
        meter.add(scores, layout)
    found = meter.read()
    assert {name: values.counts.sum() for name, values in found.items()} == {"video": 3 * 4, "audio": 1 * 4}
    assert found["video"].summary()["mean"] == pytest.approx(0.4)
    assert found["audio"].summary()["std"] == pytest.approx(0.0, abs=1e-6)
    assert meter.read() == {}


def test_a_modality_that_did_not_occur_and_plans_without_scores_are_left_out():
    meter = ScoreMeter(Summing())
    meter.add(None, layout_of([Modality.VIDEO]))
    assert meter.read() == {}
    meter.add(torch.tensor([[0.5]]), layout_of([Modality.VIDEO]))
    assert meter.read().keys() == {"video"}


def test_counting_never_waits_for_the_device():
    layout = layout_of([Modality.VIDEO, Modality.AUDIO, Modality.TEXT]).to("meta")
    meter = ScoreMeter(Summing())
    with NoWaiting():
        for _ in range(2):
            meter.add(torch.empty(1, 3, device="meta"), layout)
