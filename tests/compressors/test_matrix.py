"""What is true of every method on every kind of sample."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from omnisieve.compressors import Compressor, UnreachableRatioError
from omnisieve.layout import Modality
from omnisieve.plan import Plan
from tests.compressors.cases import (
    LAYOUTS,
    METHODS,
    OUT_OF_REACH,
    PUBLISHED,
    Batch,
    Sample,
    batch_of,
    build,
    in_reach,
    label,
    plan_of,
    ratios_of,
)
from tests.layouts import FAMILIES, LayoutSpec, specs
from tests.waiting import NoWaiting

methods = pytest.mark.parametrize("method", METHODS, ids=label)
published = pytest.mark.parametrize("method", PUBLISHED, ids=label)
ratios = pytest.mark.parametrize("ratio", ["easy", "hard"])
families = pytest.mark.parametrize("family", FAMILIES)


def asked(ratio: dict[str, float], video: int, audio: int) -> float:
    """Kept media tokens before rounding."""
    if "retained_ratio" in ratio:
        return ratio["retained_ratio"] * (video + audio)
    return ratio["video_ratio"] * video + ratio["audio_ratio"] * audio


def check_plan(plan: Plan, batch: Batch) -> None:
    """Text and images stay, padding does not, nothing changes its order."""
    modality = torch.from_numpy(batch.layout.modality)
    assert plan.keep[(modality == Modality.TEXT) | (modality == Modality.IMAGE)].all()
    assert not plan.keep[modality == Modality.PADDING].any()
    compressed = plan.apply(batch.embeds)
    for row, keep in enumerate(plan.keep):
        index = compressed.index[row, compressed.attention_mask[row]]
        assert torch.equal(index, keep.nonzero()[:, 0])
        if plan.merge is None:
            rows = compressed.embeds[row, compressed.attention_mask[row]]
            torch.testing.assert_close(rows, batch.embeds[row, index], rtol=0, atol=0)


@methods
@pytest.mark.parametrize("ratio", ["easy", "hard", "pair"])
@families
def test_the_budget_is_met_exactly(method: tuple[str, dict[str, Any]], ratio: str, family: str) -> None:
    compressor = build(method, **ratios_of(method, ratio))
    batch = batch_of(*in_reach(method, ratio), family=family)
    plan, budget = plan_of(compressor, batch), compressor.budget(batch.layout)
    measured = plan.measured(batch.layout)
    assert budget.exact
    np.testing.assert_array_equal(measured["video"], budget.video)
    np.testing.assert_array_equal(measured["audio"], budget.audio)
    np.testing.assert_array_equal(plan.keep.sum(dim=1), plan.kept)
    wanted = {"retained_ratio": 1.0} if method[0] == "full" else ratios_of(method, ratio)
    for row, total in enumerate(budget.total):
        video, audio = (int(batch.layout.counts(m)[row]) for m in (Modality.VIDEO, Modality.AUDIO))
        parts = 1 if "retained_ratio" in wanted else 2
        assert abs(total - asked(wanted, video, audio)) <= 0.5 * parts or total == 1
    check_plan(plan, batch)


@methods
@ratios
@families
def test_a_sample_is_treated_alike_alone_and_in_a_batch(
    method: tuple[str, dict[str, Any]], ratio: str, family: str
) -> None:
    assert_invariant(build(method, **ratios_of(method, ratio)), in_reach(method, ratio), family)


@pytest.mark.parametrize(("method", "ratio"), OUT_OF_REACH, ids="-".join)
@families
def test_what_cannot_be_reached_is_refused(method: str, ratio: str, family: str) -> None:
    """By name of the reachable range, and by every sample alone: the batch is no excuse."""
    case = (method, {})
    compressor = build(case, **ratios_of(case, ratio))
    for name in OUT_OF_REACH[method, ratio]:
        batch = batch_of(name, family=family)
        with pytest.raises(UnreachableRatioError, match=rf"{method}: sample 0 .* reachable are"):
            plan_of(compressor, batch)
        with pytest.raises(UnreachableRatioError):
            compressor.budget(batch.layout)


@published
@families
def test_published_rounding_keeps_at_most_its_bound(method: tuple[str, dict[str, Any]], family: str) -> None:
    compressor = build(method, **ratios_of(method, "published"), rounding="official")
    batch = batch_of(*in_reach(method, "published"), family=family)
    plan, budget = plan_of(compressor, batch), compressor.budget(batch.layout)
    measured = plan.measured(batch.layout)
    compare = np.testing.assert_array_equal if budget.exact else np.testing.assert_array_less
    slack = 0 if budget.exact else 1
    for name in ("video", "audio"):
        compare(measured[name], getattr(budget, name) + slack)
    check_plan(plan, batch)
    assert_invariant(compressor, in_reach(method, "published"), family)


@methods
@given(st.lists(specs, min_size=1, max_size=3), st.sampled_from([0.05, 0.25, 0.4, 0.7, 0.9]), st.sampled_from(FAMILIES))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_so_are_samples_of_any_kind(
    method: tuple[str, dict[str, Any]], samples: list[LayoutSpec], ratio: float, family: str
) -> None:
    """Whatever `budget` promises from the layout alone is kept; what it does not, it refuses."""
    compressor, batch = build(method, retained_ratio=ratio), batch_of(*samples, family=family)
    try:
        budget = compressor.budget(batch.layout)
    except UnreachableRatioError:
        assume(False)
    measured = plan_of(compressor, batch).measured(batch.layout)
    np.testing.assert_array_equal(measured["video"], budget.video)
    np.testing.assert_array_equal(measured["audio"], budget.audio)
    assert_invariant(compressor, tuple(samples), family)


def assert_invariant(compressor: Compressor, samples: tuple[Sample, ...], family: str) -> None:
    """Alone, in a batch, in another order and padded on the other side: the same tokens, equally merged."""
    shuffled = tuple(np.random.default_rng(0).permutation(samples))
    batches = [batch_of(*samples, family=family), batch_of(*shuffled, padding_side="left", family=family)]
    outcomes = [(plan.keep, merged(plan, batch)) for batch in batches for plan in [plan_of(compressor, batch)]]
    for name in samples:
        alone = batch_of(name, family=family)
        plan = plan_of(compressor, alone)
        for names, batch, (keep, embeds) in zip((samples, shuffled), batches, outcomes, strict=True):
            row = names.index(name)
            assert torch.equal(batch.sample(row, keep), plan.keep[0]), name
            torch.testing.assert_close(batch.sample(row, embeds), merged(plan, alone)[0], rtol=1e-5, atol=1e-5)


def merged(plan: Plan, batch: Batch) -> torch.Tensor:
    """Embeddings after merging, dropped tokens zero."""
    embeds = batch.embeds if plan.merge is None else plan.merge.apply(batch.embeds)
    return embeds.masked_fill(~plan.keep.unsqueeze(-1), 0)


@methods
def test_ratio_one_keeps_everything(method: tuple[str, dict[str, Any]]) -> None:
    batch = batch_of(*LAYOUTS)
    plan = plan_of(build(method, retained_ratio=1.0), batch)
    assert torch.equal(plan.keep, batch.present)
    assert plan.is_identity(batch.layout)


@methods
@ratios
def test_half_precision_chooses_the_same(method: tuple[str, dict[str, Any]], ratio: str) -> None:
    """The same values, ties included: what is compared is computed in single precision, whatever the model runs in."""
    compressor = build(method, **ratios_of(method, ratio))
    half = batch_of(*in_reach(method, ratio)).to(torch.bfloat16)
    single = half.to(torch.float32)
    plans = plan_of(compressor, half), plan_of(compressor, single)
    assert torch.equal(plans[0].keep, plans[1].keep)
    torch.testing.assert_close(merged(plans[0], half).float(), merged(plans[1], single), rtol=0.02, atol=0.02)


@methods
@pytest.mark.parametrize("training", [False, True])
def test_planning_never_waits(method: tuple[str, dict[str, Any]], training: bool) -> None:
    compressor, batch = build(method, **ratios_of(method, "easy")), batch_of(*in_reach(method, "easy"))
    away, elsewhere = copy.deepcopy(compressor).to("meta").train(training), batch.to("meta")
    needs = elsewhere.needs(compressor)
    with torch.set_grad_enabled(training), NoWaiting():
        plan = away.plan(elsewhere.embeds, elsewhere.layout, needs)
        applied = plan.apply(elsewhere.embeds)
    np.testing.assert_array_equal(plan.kept, plan_of(compressor, batch).kept)
    assert applied.embeds.shape == (len(plan.kept), plan.kept.max(), batch.embeds.shape[-1])


@published
def test_published_rounding_never_waits(method: tuple[str, dict[str, Any]]) -> None:
    compressor = build(method, **ratios_of(method, "published"), rounding="official").to("meta")
    batch = batch_of(*in_reach(method, "published")).to("meta")
    needs = batch.needs(compressor)
    with torch.no_grad(), NoWaiting():
        assert compressor.plan(batch.embeds, batch.layout, needs).apply(batch.embeds).embeds.is_meta


WAITS = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: 1 if x.any() else 0,
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "write through a boolean index": lambda x: x.index_put_((x > 0,), torch.ones(2, device="meta")),
    "copy": lambda x: x.cpu(),
    "copy into": lambda x: torch.ones(3).copy_(x),
    "list": lambda x: x.tolist(),
    "upload that blocks": lambda x: torch.ones(3).to(x.device),
    "unique": lambda x: x.unique(),
    "comparison": lambda x: torch.equal(x, x + 1),
}


@pytest.mark.parametrize("wait", WAITS)
def test_waiting_is_found_out(wait: str) -> None:
    values = torch.ones(3, device="meta")
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoWaiting():
        WAITS[wait](values)


def test_what_does_not_wait_is_let_through() -> None:
    values = torch.ones(3, device="meta")
    with NoWaiting():
        index = torch.arange(2).to(values.device, non_blocking=True)
        assert values[index].is_meta
        assert values.masked_fill(values > 0, 2.0).double().is_meta


@methods
def test_plans_repeat(method: tuple[str, dict[str, Any]]) -> None:
    """The same input twice gives the same plan; methods keep no state."""
    compressor, batch = build(method, **ratios_of(method, "easy")), batch_of(*in_reach(method, "easy"))
    assert torch.equal(plan_of(compressor, batch).keep, plan_of(compressor, batch).keep)
