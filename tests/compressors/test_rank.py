"""Methods that can be split into counts per segment and an order of all tokens keep what the two say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from omnisieve.compressors import Compressor, CompressorError, build_compressor, compressor_type
from omnisieve.layout import MEDIA
from tests.compressors.cases import METHODS, PUBLISHED, Batch, build, in_reach, label, plan_of, ratios_of

Case = tuple[str, dict[str, Any]]
SPLIT = [case for case in METHODS if compressor_type(case[0]).rank is not Compressor.rank]


def ranked(compressor: Compressor, batch: Batch):
    needs = batch.needs(compressor)
    with torch.no_grad():
        return compressor.rank(batch.embeds, batch.layout, {need: needs[need] for need in compressor.rank_needs})


def test_most_methods_can_be_split() -> None:
    names = {name for name, _ in SPLIT}
    assert {"dash", "divprune", "divprune_om", "dycoke", "dycoke_va", "omnizip", "random", "stvp"} <= names
    assert {"visionzip", "visionzip_om", "windivprune"} <= names


@pytest.mark.parametrize("case", SPLIT, ids=label)
@pytest.mark.parametrize("ratio", ["easy", "hard", "pair"])
def test_the_best_of_each_segment_are_what_is_kept(case: Case, ratio: str) -> None:
    batch, compressor = Batch(in_reach(case, ratio)), build(case, **ratios_of(case, ratio))
    parts = ranked(compressor, batch)
    assert torch.equal(parts[0].keep() | parts[1].keep(), plan_of(compressor, batch).keep & batch.layout.mask(*MEDIA))
    for part, modality in zip(parts, MEDIA, strict=True):
        covered = part.segments.scatter(part.segments.valid, False)
        assert torch.equal(covered, batch.layout.mask(modality))


@pytest.mark.parametrize("case", [c for c in PUBLISHED if c in SPLIT and c[0] not in ("dash", "omnisift")], ids=label)
def test_so_are_they_under_published_rounding(case: Case) -> None:
    batch = Batch(in_reach(case, "published"))
    compressor = build(case, **ratios_of(case, "published"), rounding="official")
    video, audio = ranked(compressor, batch)
    assert torch.equal(video.keep() | audio.keep(), plan_of(compressor, batch).keep & batch.layout.mask(*MEDIA))


@pytest.mark.parametrize("case", SPLIT, ids=label)
def test_even_scores_are_the_same_order_without_ties(case: Case) -> None:
    batch, compressor = Batch(in_reach(case, "easy")), build(case, **ratios_of(case, "easy"))
    for part in ranked(compressor, batch):
        even = part.even_scores()
        assert torch.equal(replace(part, scores=even).keep(), part.keep())
        size = part.segments.valid.sum(dim=-1)
        values = part.segments.gather(even).masked_fill(~part.segments.valid, 0)
        torch.testing.assert_close(values.sum(dim=-1), torch.zeros(size.shape), atol=1e-3, rtol=0)
        variance = values.square().sum(dim=-1)[size > 0] / size[size > 0]
        torch.testing.assert_close(variance, 1 - 1 / size[size > 0].square())
        slots = torch.arange(values.shape[-1]).expand_as(values)
        alone = torch.where(part.segments.valid, values, 10.0 + slots).sort(dim=-1).values
        assert (alone.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("name", ["divprune_om", "windivprune"])
def test_a_greedy_order_does_not_depend_on_how_many_stay(name: str) -> None:
    batch = Batch(in_reach((name, {}), "easy"))
    few, many = (ranked(build((name, {}), retained_ratio=ratio), batch) for ratio in (0.1, 0.9))
    for one, other in zip(few, many, strict=True):
        assert torch.equal(one.scores, other.scores)
        assert not (one.keep() & ~other.keep()).any()


def test_what_cannot_be_split_says_so() -> None:
    batch = Batch(["audio_video"])
    for compressor in (
        build_compressor("fastvid", retained_ratio=0.6),
        build_compressor("dash", retained_ratio=0.4, rounding="official"),
    ):
        with pytest.raises(CompressorError, match=compressor.name):
            compressor.rank(batch.embeds, batch.layout, batch.needs(compressor))
