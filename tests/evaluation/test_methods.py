"""Entries of `methods`, and the bounds that only an evaluation knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from omnisieve.artifact import save_compressor
from omnisieve.compressors import CompressorError, build_compressor, list_compressors
from omnisieve.evaluation.bounds import build_bound, evidence_mask, show_evidence
from omnisieve.evaluation.methods import resolve_methods
from omnisieve.layout import Modality, TokenLayout
from tests.layouts import LayoutSpec, make_map
from tests.trained import export_tuned

EVIDENCE = {"video": [[0, 0, 0], [5, 3, 2]], "audio": [0, 7, 29]}


@pytest.fixture
def layout() -> TokenLayout:
    """Two samples of 3 windows: 6 grids of 4 x 4 and 30 audio tokens."""
    return TokenLayout.stack([make_map(LayoutSpec(text=5)), make_map(LayoutSpec(text=9))], padding_side="left")


@pytest.fixture
def exported(tmp_path: Path) -> str:
    compressor = build_compressor("omnisift", hidden_size=8, width=8, heads=2, video_ratio=0.2, audio_ratio=0.3)
    return str(save_compressor(compressor, tmp_path / "export"))


def test_full_comes_first_and_once() -> None:
    methods = resolve_methods(["random", "full"], {})
    assert [m.label for m in methods] == ["full", "random"]
    assert [list(m.ratios([0.35, 0.25])) for m in methods] == [[1.0], [0.35, 0.25]]


def test_an_exported_compressor_serves_every_ratio(exported: str) -> None:
    (method,) = resolve_methods([exported], {})
    assert (method.label, method.name, method.kind) == (exported, "omnisift", "learned")
    settings = method.build(0.15).settings
    assert (settings.retained_ratio, settings.video_ratio, settings.audio_ratio) == (0.15, None, None)


def test_variants_and_settings_per_ratio() -> None:
    settings = {"more audio": {"method": "random", "rounding": "official", "at": {0.25: {"audio_ratio": 0.4}}}}
    (method,) = resolve_methods(["more audio"], settings)
    assert (method.label, method.name, method.kind) == ("more audio", "random", "training-free")
    assert method.build(0.25).settings.audio_ratio == 0.4
    assert method.build(0.35).settings.audio_ratio is None
    assert method.build(0.35).settings.rounding == "official"


def test_an_exported_compressor_keeps_its_own_split_at_its_own_ratio(tmp_path: Path) -> None:
    folder = str(tmp_path / "split")
    save_compressor(
        build_compressor("omnisift", hidden_size=16, width=8, heads=2, retained_ratio=0.25, audio_ratio=0.4), folder
    )
    (method,) = resolve_methods([folder], {})
    assert [method.build(ratio).settings.audio_ratio for ratio in (0.25, 0.15)] == [0.4, None]
    (equal,) = resolve_methods([folder], {folder: {"at": {0.25: {"audio_ratio": 0.25}}}})
    assert equal.build(0.25).settings.audio_ratio == 0.25


def test_a_method_at_a_preset_has_the_ratio_of_the_preset(exported: str) -> None:
    methods = resolve_methods(["omnizip@omnizip/7b/35", "oracle@seats/7b/25", f"{exported}@seats/7b/10"], {})
    assert [list(m.ratios([0.5])) for m in methods] == [[0.35], [0.25], [0.1]]
    assert [(m.name, m.kind) for m in methods] == [
        ("omnizip", "training-free"),
        ("oracle", "bound"),
        ("omnisift", "learned"),
    ]
    found = [m.build(m.ratios([0.5])[0]).settings for m in methods]
    assert [(s.retained_ratio, s.video_ratio, s.audio_ratio) for s in found] == [
        (None, 0.3, 0.6),
        (None, 0.2, 0.55),
        (None, 0.06, 0.35),
    ]


def test_a_variant_at_a_preset_keeps_its_own_fields() -> None:
    settings = {"as published": {"method": "omnizip@omnizip/7b/45-avut", "rounding": "official", "merge_group": 3}}
    (method,) = resolve_methods(["as published"], settings)
    built = method.build(0.45).settings
    assert (method.label, built.rounding, built.merge_group, built.video_ratio) == ("as published", "official", 3, 0.4)


def test_mistakes_about_presets_are_named() -> None:
    with pytest.raises(CompressorError, match="no preset is named 'omnizip/7b/36'; did you mean 'omnizip/7b/35'"):
        resolve_methods(["omnizip@omnizip/7b/36"], {})
    with pytest.raises(CompressorError, match="did you mean 'omnizip'"):
        resolve_methods(["omnizp@omnizip/7b/35"], {})
    entry = "random@seats/7b/35"
    with pytest.raises(CompressorError, match="audio_ratio is given, but the preset has ratios"):
        resolve_methods([entry], {entry: {"audio_ratio": 0.5}})


def test_an_export_brings_its_llm_and_others_may_borrow_it(tmp_path: Path, exported: str) -> None:
    folder = str(export_tuned(tmp_path / "tuned")[0])
    settings = {"borrowed": {"method": "full", "llm": folder}, "stock": {"method": folder, "llm": None}}
    methods = resolve_methods([folder, exported, "borrowed", "stock", "oracle"], settings | {"oracle": {"llm": folder}})
    assert {m.label: m.llm for m in methods} == {
        "borrowed": Path(folder),
        folder: Path(folder),
        exported: None,
        "stock": None,
        "oracle": Path(folder),
    }
    assert not any(m.settings for m in methods)


def test_an_llm_that_cannot_be_put_on_is_refused(tmp_path: Path, exported: str) -> None:
    folder = str(export_tuned(tmp_path / "full", "full")[0])
    with pytest.raises(CompressorError, match=rf"as a whole.*export\.py {folder} OUT --merge.*model\.path"):
        resolve_methods([folder], {})
    with pytest.raises(CompressorError, match="trained on a frozen one"):
        resolve_methods(["random"], {"random": {"llm": exported}})
    (method,) = resolve_methods([folder], {folder: {"llm": None}})
    assert method.llm is None


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match="did you mean 'random'"):
        resolve_methods(["randon"], {})
    with pytest.raises(CompressorError, match="no exported compressor"):
        resolve_methods([str(tmp_path / "missing")], {})
    with pytest.raises(CompressorError, match="learned: name the folder"):
        resolve_methods(["omnisift"], {})
    with pytest.raises(CompressorError, match="no compressor is named 'randon'"):
        resolve_methods(["full"], {"randon": {"seed": 1}})
    with pytest.raises(CompressorError, match="no setting 'ratio'"):
        resolve_methods(["oracle"], {"oracle": {"ratio": 1}})[0].build(0.25)


def test_bounds_cannot_be_built_by_name() -> None:
    assert not {"oracle", "no_media"} & set(list_compressors())


def test_evidence_finds_its_tokens(layout: TokenLayout) -> None:
    mask = evidence_mask([EVIDENCE, {"video": [], "audio": []}], layout)
    assert mask.sum(axis=1).tolist() == [5, 0]
    chosen = [(layout.frame[0, i], layout.row[0, i], layout.column[0, i]) for i in np.flatnonzero(mask[0])]
    assert (5, 3, 2) in chosen
    audio = np.flatnonzero(layout.modality[0] == Modality.AUDIO)
    assert mask[0, audio[[0, 7, 29]]].all()


def test_oracle_keeps_the_evidence_and_the_exact_budget(layout: TokenLayout) -> None:
    oracle = build_bound("oracle", retained_ratio=0.25)
    show_evidence(oracle, [EVIDENCE, EVIDENCE])
    plan = oracle.plan(torch.zeros(2, layout.length, 4), layout)
    assert plan.keep.numpy()[evidence_mask([EVIDENCE, EVIDENCE], layout)].all()
    # A quarter of 96 video and 30 audio tokens.
    assert sum(plan.measured(layout).values()).tolist() == [32, 32]


def test_oracle_without_evidence_is_an_error(layout: TokenLayout) -> None:
    with pytest.raises(CompressorError, match="evidence"):
        build_bound("oracle", retained_ratio=0.25).plan(torch.zeros(2, layout.length, 4), layout)


def test_no_media_keeps_text_only(layout: TokenLayout) -> None:
    (method,) = resolve_methods(["no_media"], {})
    assert method.ratios([0.35, 0.25]) == (0.0,)
    plan = method.build(0.0).plan(torch.zeros(2, layout.length, 4), layout)
    assert torch.equal(plan.keep, layout.mask(Modality.TEXT))
    assert plan.kept.tolist() == layout.counts(Modality.TEXT).tolist()
