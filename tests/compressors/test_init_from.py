"""A learned compressor with a base begins as the base: it keeps the same tokens until it is trained."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omnisieve import build_compressor, load_compressor, save_compressor
from omnisieve.artifact import CONFIG_FILE
from omnisieve.compressors import Compressor, CompressorError, UnreachableRatioError
from omnisieve.compressors.learned import can_be_base
from omnisieve.layout import MEDIA, Modality
from tests.compressors.cases import HIDDEN, LAYOUTS, Batch, batch_of, in_reach, label, ratios_of
from tests.waiting import NoWaiting

Case = tuple[str, dict[str, Any]]
BASES: list[Case] = [
    ("stvp", {"audio_novelty": 0.3}),
    ("omnizip", {}),
    ("omnizip", {"variant": "paper"}),
    ("divprune_om", {}),
    ("visionzip_om", {}),
    ("dycoke", {}),
    ("dycoke_va", {}),
    ("dash", {"min_segment": 4}),
    ("divprune", {}),
    ("random", {}),
    ("visionzip", {}),
    ("windivprune", {}),
]
RATIOS = ("easy", "hard", "pair")
bases = pytest.mark.parametrize("base", BASES, ids=label)
every_ratio = pytest.mark.parametrize("ratio", RATIOS)


def learned(base: Case, video_pruner: str = "learned", **settings: Any) -> Compressor:
    torch.manual_seed(0)
    small = {"width": 32, "heads": 4, "pruner_channels": 8, "video_pruner": video_pruner}
    return build_compressor(
        "omnisift", hidden_size=HIDDEN, base=base[0], base_settings=base[1], **(small | settings)
    ).eval()


def plain(base: Case, **settings: Any) -> Compressor:
    return build_compressor(base[0], **base[1], **settings)


def keep_of(compressor: Compressor, batch: Batch) -> torch.Tensor:
    return compressor.plan(batch.embeds, batch.layout, batch.needs(compressor)).keep


@bases
@every_ratio
@pytest.mark.parametrize("training", [False, True])
def test_untrained_it_keeps_what_its_base_keeps(base: Case, ratio: str, training: bool) -> None:
    batch, ratios = batch_of(*in_reach(base, ratio)), ratios_of(base, ratio)
    compressor = learned(base, **ratios).train(training)
    with torch.set_grad_enabled(training):
        plan = compressor.plan(batch.embeds, batch.layout, batch.needs(compressor))
    assert torch.equal(plan.keep, keep_of(plain(base, **ratios), batch))
    np.testing.assert_array_equal(plan.kept, plan.keep.sum(dim=1))
    assert plan.exact
    assert plan.merge is None
    if training:
        media = batch.layout.mask(*MEDIA)
        assert torch.equal(plan.gate[media], plan.keep[media].float())


@bases
@pytest.mark.parametrize("name", LAYOUTS)
def test_so_does_it_on_every_sample_alone(base: Case, name: str) -> None:
    ratios = ratios_of(base, "easy")
    if name not in in_reach(base, "easy"):
        with pytest.raises(UnreachableRatioError, match=base[0]):
            keep_of(learned(base, **ratios), batch_of(name))
        return
    for side in ("left", "right"):
        batch = batch_of(name, padding_side=side)
        assert torch.equal(keep_of(learned(base, **ratios), batch), keep_of(plain(base, **ratios), batch))


@bases
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.55, 0.8, 1.0])
def test_and_at_a_ratio_that_is_drawn_later(base: Case, ratio: float) -> None:
    compressor, batch = learned(base, retained_ratio=0.9), batch_of("audio_video", "two_videos", "image")
    try:
        expected = keep_of(plain(base, retained_ratio=ratio), batch)
    except UnreachableRatioError:
        with pytest.raises(UnreachableRatioError):
            keep_of(compressor.at(retained_ratio=ratio), batch)
    else:
        assert torch.equal(keep_of(compressor.at(retained_ratio=ratio), batch), expected)


@bases
def test_half_precision_makes_no_difference(base: Case) -> None:
    """Places in the base's order differ by less than half precision can tell; its ties would show."""
    ratios, batch = ratios_of(base, "easy"), copy.copy(batch_of(*in_reach(base, "easy")))
    batch.embeds = batch.embeds.bfloat16()
    compressor = learned(base, **ratios).to(torch.bfloat16)
    assert torch.equal(keep_of(compressor, batch), keep_of(plain(base, **ratios), batch))


@bases
@pytest.mark.parametrize("score_norm", ["window", "none"])
def test_every_trainable_gets_a_gradient_and_one_step_changes_the_scores(base: Case, score_norm: str) -> None:
    ratios, batch = ratios_of(base, "easy"), batch_of(*in_reach(base, "easy"))
    compressor, needs = learned(base, score_norm=score_norm, **ratios).train(), None
    needs = batch.needs(compressor)
    optimizer = torch.optim.SGD(compressor.parameters(), lr=1.0)
    before = [part.scores.detach().clone() for part in compressor.rank(batch.embeds, batch.layout, needs)]
    plan = compressor.plan(batch.embeds, batch.layout, needs)
    wanted = torch.randn(plan.gate.shape, generator=torch.Generator().manual_seed(1))
    (plan.gate * wanted).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in compressor.parameters())
    optimizer.step()
    after = [part.scores.detach() for part in compressor.rank(batch.embeds, batch.layout, needs)]
    for modality, old, new in zip(MEDIA, before, after, strict=True):
        inside = batch.layout.mask(modality)
        assert not torch.equal(old[inside], new[inside])


@bases
def test_what_is_learned_can_overturn_the_base_but_not_its_counts(base: Case) -> None:
    ratios, batch = ratios_of(base, "easy"), batch_of(*in_reach(base, "easy"))
    compressor = learned(base, **ratios)
    with torch.no_grad():
        start = compressor.rank(batch.embeds, batch.layout, batch.needs(compressor))
        for layer in (compressor.selector.score_head[-1], compressor.pruner.cnn[-1]):
            layer.weight.normal_(std=3.0)
        trained = compressor.rank(batch.embeds, batch.layout, batch.needs(compressor))
    for modality, old, new in zip(MEDIA, start, trained, strict=True):
        assert torch.equal(old.counts, new.counts)
        moved = (old.keep() != new.keep())[batch.layout.mask(modality)].sum()
        assert moved > 0 or compressor.asked(batch.layout).of(modality).sum() == batch.layout.counts(modality).sum()


def test_with_the_similarity_pruner_only_audio_has_the_base() -> None:
    base, batch = ("omnizip", {}), batch_of(*LAYOUTS)
    compressor = learned(base, "similarity", retained_ratio=0.25)
    keep = keep_of(compressor, batch)
    video, audio = (batch.layout.mask(modality) for modality in MEDIA)
    assert torch.equal(keep & audio, keep_of(plain(base, retained_ratio=0.25), batch) & audio)
    assert torch.equal(keep & video, keep_of(plain(("stvp", {}), retained_ratio=0.25), batch) & video)


def test_audio_stays_whole_where_the_base_leaves_it_so() -> None:
    batch = batch_of("audio_video", "two_videos")
    for pruner in ("learned", "similarity"):
        compressor = learned(("dycoke", {}), pruner, retained_ratio=0.7)
        budget = compressor.budget(batch.layout)
        np.testing.assert_array_equal(budget.audio, batch.layout.counts(Modality.AUDIO))
        np.testing.assert_array_equal(
            budget.video, plain(("dycoke", {}), retained_ratio=0.7).budget(batch.layout).video
        )
        assert (keep_of(compressor, batch) & batch.layout.mask(*MEDIA)).sum() == budget.total.sum()


@bases
def test_planning_never_waits(base: Case) -> None:
    compressor = learned(base, **ratios_of(base, "easy")).to("meta")
    batch = batch_of(*in_reach(base, "easy")).to("meta")
    needs = batch.needs(compressor)
    with torch.no_grad(), NoWaiting():
        assert compressor.plan(batch.embeds, batch.layout, needs).keep.is_meta


def test_it_needs_what_the_order_of_its_base_needs() -> None:
    assert learned(("stvp", {}), retained_ratio=0.25).needs == ()
    zipped = plain(("visionzip_om", {}), retained_ratio=0.25)
    needs = learned(("visionzip_om", {}), retained_ratio=0.25).needs
    assert set(needs) < set(zipped.needs)
    assert all(need.kind == "attention_received" for need in needs)
    audio = learned(("omnizip", {"scope": "file"}), retained_ratio=0.25).needs
    assert [need.span for need in audio] == ["global"]


def test_an_export_takes_its_base_along(tmp_path: Path) -> None:
    base = ("omnizip", {"variant": "paper", "neighbours": 3})
    compressor, batch = learned(base, retained_ratio=0.25), batch_of(*LAYOUTS)
    with torch.no_grad():
        compressor.selector.score_head[-1].weight.normal_()
    folder = save_compressor(compressor, tmp_path / "out")
    assert json.loads((folder / CONFIG_FILE).read_text())["settings"]["base"] == "omnizip"
    loaded = load_compressor(folder)
    assert loaded.settings == compressor.settings
    assert loaded.base.settings == plain(base, retained_ratio=0.25).settings
    assert torch.equal(keep_of(loaded, batch), keep_of(compressor, batch))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"base": "stpv"}, "did you mean 'stvp'"),
        ({"base": "stvp", "base_settings": {"audio_novelti": 0.1}}, "audio_novelty"),
        ({"base": "stvp", "base_settings": {"audio_novelty": 2.0}}, "audio_novelty is 2.0"),
        ({"base": "stvp", "base_settings": {"video_ratio": 0.2}}, "video_ratio of the base is that of the compressor"),
        ({"base_settings": {"audio_novelty": 0.1}}, "without a base"),
        ({"base": "stvp", "rounding": "official"}, "which has no base"),
        ({"base": "seats"}, r"cannot be split .*choose one of .*stvp"),
        ({"base": "fastvid"}, r"cannot be split"),
        ({"base": "omnisift"}, r"cannot be split"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(CompressorError, match=told):
        build_compressor("omnisift", hidden_size=HIDDEN, retained_ratio=0.25, **settings)


def test_bases_are_the_methods_with_an_order() -> None:
    assert all(can_be_base(name) for name, _ in BASES)
    assert not can_be_base("full")
