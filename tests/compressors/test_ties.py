"""Tokens that are alike are told apart by their position, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omnisieve.compressors import Compressor
from omnisieve.compressors.inner import InnerCompressor
from omnisieve.layout import MEDIA, Modality, TokenLayout
from omnisieve.ops.diversity import maxmin_order
from omnisieve.ops.groups import rank_in_group
from omnisieve.ops.topk import ROUNDING, WIDEST, descending_rank, first_largest, settled
from tests.compressors.cases import INNER, METHODS, PUBLISHED, Batch, build, label, ratios_of
from tests.layouts import LayoutSpec, make_layout

Case = tuple[str, dict[str, Any]]
WIDTH = 96
SPECS = (
    LayoutSpec(windows=3, rows=5, columns=6, audio_per_window=17),
    LayoutSpec(windows=2, rows=5, columns=7, audio_per_window=20),
    LayoutSpec(windows=4, odd_grids=True),
    LayoutSpec(windows=5, grids_per_window=1, grid_every=2, rows=7, columns=4, audio_per_window=7),
)


def still(layout: TokenLayout, modality: Modality) -> np.ndarray:
    """Every grid is the first one; sounds come back after five tokens."""
    places = np.flatnonzero(layout.modality[0] == modality)
    period = len(layout.segments("frame", modality).index[0, 0]) if modality == Modality.VIDEO else 5
    return places[np.arange(len(places)) % period]


def repeated(layout: TokenLayout, modality: Modality) -> np.ndarray:
    """Every token is one of a quarter of them."""
    places = np.flatnonzero(layout.modality[0] == modality)
    return places[np.random.default_rng(0).integers(len(places) // 4, size=len(places))]


def constant(layout: TokenLayout, modality: Modality) -> np.ndarray:
    """All tokens are one."""
    places = np.flatnonzero(layout.modality[0] == modality)
    return np.full(len(places), places[0])


def random(layout: TokenLayout, modality: Modality) -> np.ndarray:
    """No token is like another."""
    return np.flatnonzero(layout.modality[0] == modality)


Kind = Callable[[TokenLayout, Modality], np.ndarray]
KINDS: Sequence[Kind] = (random, still, repeated, constant)


class Alike(Batch):
    """Samples in which tokens take the place of others, and all that is known of them with it, but for a rounding."""

    def __init__(self, samples: Sequence[tuple[LayoutSpec, Kind]], padding_side: str = "right", seed: int = 0) -> None:
        super().__init__([spec for spec, _ in samples], padding_side, width=WIDTH)
        self.scores = torch.zeros(self.present.shape)
        for row, (spec, kind) in enumerate(samples):
            source, alone, first = (
                np.arange(self.layout.length),
                make_layout(spec),
                int(self.present[row].int().argmax()),
            )
            for modality in MEDIA:
                source[self.layout.modality[row] == modality] = first + kind(alone, modality)
            for values in (self.embeds, self._attention, self._keys):
                values[row] = values[row, source]
        # Of a batch's own: what comes before a compressor is rounded, too.
        generator = torch.Generator().manual_seed(seed)
        for values in (self.embeds, self._attention, self._keys):
            values *= 1 + 2.0**-24 * (2 * torch.rand(values.shape, generator=generator) - 1)
        for row in range(len(samples)):
            self.scores[row] = self._attention[row] / float(self._attention[row, self.present[row]].sum())


@torch.no_grad()
def choices(compressor: Compressor, batch: Alike) -> tuple[list[Tensor], Tensor]:
    """What stays before and inside the LLM, [B, S] each, and embeddings with what is merged."""
    plan = compressor.plan(batch.embeds, batch.layout, batch.needs(compressor))
    kept = [plan.keep]
    if isinstance(compressor, InnerCompressor):
        for number in range(sum(cut.score is not None for cut in compressor.cuts())):
            alive = kept[-1] & batch.layout.mask(*MEDIA)
            kept.append(alive & compressor.keep_after(number, batch.scores * alive, alive, batch.layout))
    merged = batch.embeds if plan.merge is None else plan.merge.apply(batch.embeds)
    return kept, merged * plan.keep.unsqueeze(-1)


def assert_alike(case: Case, rounding: str, shift: int, padding_side: str) -> None:
    budget: Mapping[str, Any] = {} if case[0] == "full" else ratios_of(case, "published") | {"rounding": rounding}
    if case[0] in ("dycoke_va", "fastv"):
        budget = {"retained_ratio": 0.6, "rounding": rounding}
    compressor = build(case, hidden_size=WIDTH, **budget)
    if isinstance(compressor, InnerCompressor):
        compressor = compressor.for_depth(8)
    samples = [(spec, KINDS[(number + shift) % len(KINDS)]) for number, spec in enumerate(SPECS)]
    batch = Alike(samples, padding_side)
    together, merged = choices(compressor, batch)
    for row, sample in enumerate(samples):
        alone, merged_alone = choices(compressor, Alike([sample], seed=1 + row))
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(batch.sample(row, one), other[0]), sample
        torch.testing.assert_close(batch.sample(row, merged), merged_alone[0], rtol=1e-4, atol=1e-4)


CASES = [
    pytest.param(case, rounding, id=f"{label(case)}-{rounding}")
    for cases, rounding in (((*METHODS, *INNER), "exact"), ((*PUBLISHED, *INNER), "official"))
    for case in cases
]


@pytest.mark.parametrize(("case", "rounding"), CASES)
def test_tokens_that_are_alike_are_ordered_by_position_in_any_batch(case: Case, rounding: str) -> None:
    assert_alike(case, rounding, crc32(repr((case, rounding)).encode()), "right")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "rounding"), CASES)
@pytest.mark.parametrize("shift", range(len(KINDS)))
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_so_they_are_of_every_kind(case: Case, rounding: str, shift: int, padding_side: str) -> None:
    assert_alike(case, rounding, shift, padding_side)


# The rule.


@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=12),
    st.sampled_from([1.0, 1e-5, 1e4]),
    st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=200, deadline=None)
def test_rounding_does_not_decide_between_equal_scores(
    values: list[int], size: float, seed: int, dtype: torch.dtype
) -> None:
    """Away from 0 relative to the scores themselves; with a scale everywhere."""
    exact = torch.tensor(values, dtype=dtype) * size
    noise = (torch.rand(exact.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) - 0.5) * ROUNDING / 2
    valid = torch.rand(exact.shape, generator=torch.Generator().manual_seed(seed)) < 0.8
    expected = descending_rank(exact, valid, None)
    assert torch.equal(descending_rank(exact * (1 + noise), valid), expected)
    assert torch.equal(descending_rank(exact + size * noise, valid, size), expected)
    # In groups: all of one, or what is not valid in none.
    group = torch.where(valid, 0, 1)[None]
    ranks = rank_in_group(-(exact + size * noise)[None], group, 1, size)[0]
    assert torch.equal(ranks[valid], expected[valid])
    if valid.any():
        first = first_largest((exact / size + noise).masked_fill(~valid, -torch.inf))
        assert expected[first] == 0


def test_scores_that_lie_densely_are_still_told_apart() -> None:
    """Neighbours are equal to rounding, from end to end they are not."""
    scores = 1 - torch.arange(4000, dtype=torch.float64) * ROUNDING / 2
    order = descending_rank(scores.flip(0), torch.ones(4000, dtype=torch.bool)).flip(0)
    width = round(2 * WIDEST / ROUNDING)
    assert (order.diff().abs() <= 2 * width).all()
    assert (order - torch.arange(4000)).abs().max() < width + 1


def test_scores_relative_to_nothing_but_themselves_may_be_of_any_size() -> None:
    scores = 10.0 ** -torch.arange(1, 30).float()
    assert torch.equal(descending_rank(scores, scores > 0), torch.arange(29))
    assert torch.equal(descending_rank(scores, scores > 0, 1.0)[:5], torch.arange(5))


def test_infinite_and_whole_scores_are_no_rounding() -> None:
    inf, valid = torch.inf, torch.ones(6, dtype=torch.bool)
    assert descending_rank(torch.tensor([-inf, 1.0, inf, -inf, inf, 1e38]), valid).tolist() == [4, 3, 0, 5, 1, 2]
    whole = torch.tensor([10**9, 10**9 + 1, 10**9 - 1, 0, 1, 10**9 + 1])
    assert descending_rank(whole, valid).tolist() == [2, 0, 3, 5, 4, 1]


def test_what_is_alike_can_be_settled_before_it_is_computed_with() -> None:
    scores = torch.tensor([0.5, 0.25, 0.5 * (1 - ROUNDING / 2), 9.0])
    valid = torch.tensor([True, True, True, False])
    assert settled(scores, valid).tolist() == [0.5, 0.25, 0.5, -torch.inf]


def test_ranking_cuts_no_gradient() -> None:
    scores = torch.randn(7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    settled(scores, torch.ones(7, dtype=torch.bool)).sum().backward()
    assert torch.equal(scores.grad, torch.ones(7))
    assert not descending_rank(scores, torch.ones(7, dtype=torch.bool)).requires_grad


def test_a_greedy_pick_takes_the_first_of_identical_tokens() -> None:
    x = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(0))
    twice = torch.cat([x, x * 3])[None]
    for weight in (None, torch.ones(1, 18)):
        order = maxmin_order(twice, torch.ones(1, 18, dtype=torch.bool), 9, weight)
        assert sorted(order[0].tolist()) == list(range(9))
