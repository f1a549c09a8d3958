"""What is true of every method that prunes inside the LLM, without an LLM: scores are made up."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from omnisieve import build_compressor
from omnisieve.compressors import CompressorError, UnreachableRatioError
from omnisieve.compressors.inner import InnerCompressor
from omnisieve.layout import MEDIA, Modality
from tests.compressors.cases import INNER, LAYOUTS, Batch, batch_of, build, label, plan_of
from tests.layouts import FAMILIES, QWEN2_5, LayoutSpec, make_layout
from tests.waiting import NoWaiting

RATIOS: dict[str, dict[str, float]] = {
    "easy": {"retained_ratio": 0.4},
    "hard": {"retained_ratio": 0.25},
    "pair": {"video_ratio": 0.3, "audio_ratio": 0.6},
}
OWN_RATIOS = {("fastv", "hard"): {"retained_ratio": 0.35}}
DEPTHS = (8, 28, 36)

methods = pytest.mark.parametrize("method", INNER, ids=label)
ratios = pytest.mark.parametrize("ratio", RATIOS)
depths = pytest.mark.parametrize("depth", DEPTHS)
families = pytest.mark.parametrize("family", FAMILIES)


def scores_of(batch: Batch, names: tuple[str, ...], cut: int) -> Tensor:
    """[B, S], those of a sample independent of its neighbours."""
    scores = torch.zeros(batch.present.shape)
    for row, name in enumerate(names):
        generator = torch.Generator().manual_seed(97 * cut + list(LAYOUTS).index(name))
        scores[row, batch.present[row]] = torch.rand(int(batch.present[row].sum()), generator=generator)
    return scores / 100


def ratios_of(method: tuple[str, dict[str, Any]], ratio: str) -> dict[str, float]:
    return OWN_RATIOS.get((method[0], ratio), RATIOS[ratio])


def bound(method: tuple[str, dict[str, Any]], depth: int, **budget: Any) -> InnerCompressor:
    compressor = build(method, **budget)
    assert isinstance(compressor, InnerCompressor)
    return compressor.for_depth(depth)


@cache
def reachable(compressor: InnerCompressor, family: str = QWEN2_5) -> tuple[str, ...]:
    """Names of the samples on which the ratio can be had."""
    names = []
    for name in LAYOUTS:
        try:
            compressor.counts(batch_of(name, family=family).layout)
        except UnreachableRatioError:
            continue
        names.append(name)
    assert "audio_video" in names
    return tuple(names)


def left_after_cuts(compressor: InnerCompressor, batch: Batch, names: tuple[str, ...]) -> list[Tensor]:
    """Media tokens at the entry and after each cut, [B, S] bool each."""
    media = batch.layout.mask(*MEDIA)
    left = [plan_of(compressor, batch).keep & media]
    for number, cut in enumerate(compressor.cuts()):
        if cut.score is None:
            left.append(torch.zeros_like(media))
        else:
            scores = scores_of(batch, names, number).masked_fill(~left[-1], 0)
            left.append(left[-1] & compressor.keep_after(number, scores, left[-1], batch.layout))
    return left


@methods
@depths
def test_cuts_follow_each_other_and_score_what_is_there(method: tuple[str, dict[str, Any]], depth: int) -> None:
    cuts = bound(method, depth, retained_ratio=0.4).cuts()
    after = [cut.after for cut in cuts]
    assert after == sorted(set(after))
    assert after[0] >= 0
    assert after[-1] < depth - 1
    for cut in cuts:
        assert cut.score is None or 0 <= cut.score.layer + (cut.score.on == "output") <= cut.after + 1


@methods
@ratios
@depths
@families
def test_announced_counts_are_met_exactly(
    method: tuple[str, dict[str, Any]], ratio: str, depth: int, family: str
) -> None:
    compressor = bound(method, depth, **ratios_of(method, ratio))
    names = reachable(compressor, family)
    batch = batch_of(*names, family=family)
    left, counts = left_after_cuts(compressor, batch, names), compressor.counts(batch.layout)
    kept = plan_of(compressor, batch).keep
    assert kept[batch.layout.mask(Modality.TEXT, Modality.IMAGE)].all()
    assert not kept[~batch.present].any()
    measured = np.stack([keep.sum(dim=1).numpy() for keep in left])
    np.testing.assert_array_equal(measured[1:], counts)
    layers = compressor.layer_counts(batch.layout)
    ends = [0, *(cut.after + 1 for cut in compressor.cuts()), depth]
    np.testing.assert_array_equal(layers, np.repeat(measured, np.diff(ends), axis=0))


@methods
@ratios
@depths
def test_the_ratio_is_the_mean_over_layers(method: tuple[str, dict[str, Any]], ratio: str, depth: int) -> None:
    compressor = bound(method, depth, **ratios_of(method, ratio))
    layout = batch_of(*reachable(compressor)).layout
    mean, budget = compressor.layer_counts(layout).mean(axis=0), compressor.budget(layout)
    assert budget.exact
    np.testing.assert_allclose(budget.total, mean, atol=1)
    video, audio = (layout.counts(m) for m in MEDIA)
    wanted = ratios_of(method, ratio)
    shares = [wanted.get(f"{m.name.lower()}_ratio", wanted.get("retained_ratio")) for m in MEDIA]
    # Where a handful of tokens is left, one of them is many percent.
    large = video + audio >= 100
    np.testing.assert_allclose(mean[large], (shares[0] * video + shares[1] * audio)[large], atol=2)


@methods
@pytest.mark.parametrize("ratio", ["easy", "hard"])
@families
def test_a_sample_is_treated_alike_alone_and_in_a_batch(
    method: tuple[str, dict[str, Any]], ratio: str, family: str
) -> None:
    assert_invariant(bound(method, 28, **ratios_of(method, ratio)), family)


@methods
@families
def test_published_rounding_keeps_at_most_its_bound(method: tuple[str, dict[str, Any]], family: str) -> None:
    compressor = bound(method, 28, **ratios_of(method, "easy"), rounding="official")
    names = reachable(compressor, family)
    batch = batch_of(*names, family=family)
    measured = np.stack([keep.sum(dim=1).numpy() for keep in left_after_cuts(compressor, batch, names)])
    budget = compressor.budget(batch.layout)
    compare = np.testing.assert_array_equal if budget.exact else np.testing.assert_array_less
    slack = 0 if budget.exact else 1
    compare(measured[1:], compressor.counts(batch.layout) + slack)
    ends = [0, *(cut.after + 1 for cut in compressor.cuts()), 28]
    assert (np.diff(ends) @ measured / 28 < budget.total + 1).all()
    assert_invariant(compressor, family)


def assert_invariant(compressor: InnerCompressor, family: str) -> None:
    """Alone, in a batch, in another order and padded on the other side: the same tokens after every cut."""
    names = reachable(compressor, family)
    shuffled = tuple(np.random.default_rng(0).permutation(names))
    batches = {
        names: batch_of(*names, family=family),
        shuffled: batch_of(*shuffled, padding_side="left", family=family),
    }
    outcomes = {order: left_after_cuts(compressor, batch, order) for order, batch in batches.items()}
    for name in names:
        alone = left_after_cuts(compressor, batch_of(name, family=family), (name,))
        for order, batch in batches.items():
            for together, expected in zip(outcomes[order], alone, strict=True):
                assert torch.equal(batch.sample(order.index(name), together), expected[0]), name


@methods
def test_ratio_one_cuts_nothing(method: tuple[str, dict[str, Any]]) -> None:
    compressor, batch = bound(method, 28, retained_ratio=1.0), batch_of(*LAYOUTS)
    assert plan_of(compressor, batch).is_identity(batch.layout)
    assert (compressor.layer_counts(batch.layout) == batch.layout.counts(*MEDIA)).all()


@methods
def test_half_precision_enters_the_same_tokens(method: tuple[str, dict[str, Any]]) -> None:
    """Scores inside the LLM are single precision by definition; those of the first stage follow the embeddings."""
    compressor = bound(method, 28, retained_ratio=0.4)
    half = batch_of(*reachable(compressor)).to(torch.bfloat16)
    assert torch.equal(plan_of(compressor, half).keep, plan_of(compressor, half.to(torch.float32)).keep)


@methods
@pytest.mark.parametrize("rounding", ["exact", "official"])
def test_choosing_never_waits(method: tuple[str, dict[str, Any]], rounding: str) -> None:
    compressor = bound(method, 28, retained_ratio=0.4, rounding=rounding)
    batch = batch_of(*reachable(compressor)).to("meta")
    needs, away = batch.needs(compressor), copy.deepcopy(compressor).to("meta")
    nothing = torch.empty(batch.layout.modality.shape, device="meta")
    with torch.no_grad(), NoWaiting():
        assert away.plan(batch.embeds, batch.layout, needs).apply(batch.embeds).embeds.is_meta
        for number, cut in enumerate(away.cuts()):
            if cut.score is not None:
                assert away.keep_after(number, nothing, nothing > 0, batch.layout).is_meta


@methods
@pytest.mark.parametrize("first", ["random", "stvp", "divprune_om"])
def test_any_first_stage_goes_with_any_method(method: tuple[str, dict[str, Any]], first: str) -> None:
    name, fields = method
    compressor = build_compressor(name, **(fields | {"first": first}), retained_ratio=0.4)
    batch = batch_of("audio_video", "image")
    left = left_after_cuts(compressor, batch, ("audio_video", "image"))
    np.testing.assert_array_equal([keep.sum(dim=1) for keep in left[1:]], compressor.counts(batch.layout))
    media = batch.layout.counts(*MEDIA)
    assert (left[0].sum(dim=1).numpy() < media).all()
    np.testing.assert_allclose(compressor.layer_counts(batch.layout).mean(axis=0), 0.4 * media, atol=2)


@pytest.mark.parametrize("fields", [{"first": "seats"}, {"first": "omnisift"}, {"kv_policy": "none"}])
def test_settings_that_cannot_be(fields: dict[str, str]) -> None:
    with pytest.raises(CompressorError, match=f"{next(iter(fields))} is "):
        build_compressor("fastv_om", retained_ratio=0.4, **fields)


# FastV.


@pytest.mark.parametrize(("depth", "full"), [(8, 1), (28, 2), (36, 3), (48, 3)])
def test_fastv_scales_its_layers_to_the_depth(depth: int, full: int) -> None:
    compressor = build_compressor("fastv_om", retained_ratio=0.4).for_depth(depth)
    assert [cut.after for cut in compressor.cuts()] == [full - 1]


@pytest.mark.parametrize("first", [None, "random"])
def test_fastv_names_the_least_ratio(first: str | None) -> None:
    layout = make_layout(LayoutSpec(rows=9, columns=9))
    least = 0.125 if first is None else 0.125**2
    for ratio in (least - 1e-4, least + 1e-2):
        compressor = build_compressor("fastv_om", retained_ratio=ratio, first=first).for_depth(8)
        if ratio > least:
            assert compressor.counts(layout).all()
        else:
            with pytest.raises(UnreachableRatioError, match=rf"8 layers, of which 1 .* above {least:.4f}"):
                compressor.counts(layout)


def test_fastv_with_intact_audio_takes_all_from_video() -> None:
    layout = batch_of("audio_video").layout
    video, audio = (int(layout.counts(m)[0]) for m in MEDIA)
    compressor = build_compressor("fastv", retained_ratio=0.6)
    budget = compressor.budget(layout)
    assert budget.audio[0] == audio
    assert budget.total[0] == round(0.6 * (video + audio))
    scores = torch.rand(layout.modality.shape, generator=torch.Generator().manual_seed(0))
    keep = compressor.keep_after(0, scores, layout.mask(*MEDIA), layout)
    assert keep[layout.mask(Modality.AUDIO)].all()
    kept, dropped = (scores[layout.mask(Modality.VIDEO) & chosen] for chosen in (keep, ~keep))
    assert kept.min() > dropped.max()


def test_fastv_with_intact_audio_says_how_far_video_reaches() -> None:
    layout = batch_of("audio_video").layout
    with pytest.raises(UnreachableRatioError, match=r"beside 30 of the other .* reachable are 0\.2999 to 1\.0000"):
        build_compressor("fastv", retained_ratio=0.2).counts(layout)
    build_compressor("fastv", retained_ratio=0.2999 + 1e-4).counts(layout)


@pytest.mark.parametrize("fields", [{"k": 0}, {"score": "none"}, {"k": 8}])
def test_fastv_settings_that_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(CompressorError, match=f"{next(iter(fields))} is "):
        build_compressor("fastv_om", retained_ratio=0.4, **fields).for_depth(8).cuts()
