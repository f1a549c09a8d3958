"""Presets are what the papers print, and can be built."""

from __future__ import annotations

import pytest

from omnisieve.compressors import CompressorError, build_compressor, compressor_type, find_preset, list_presets
from omnisieve.compressors.inner import InnerCompressor
from omnisieve.compressors.presets import Preset
from omnisieve.layout import MEDIA, TokenLayout
from tests.layouts import LayoutSpec, make_layout

PRESETS = [find_preset(name) for name in list_presets()]


def share(preset: Preset) -> float:
    """Kept share of all media tokens that the ratios of both modalities give."""
    assert preset.window is not None
    video, audio = preset.window
    kept = preset.settings["video_ratio"] * video + preset.settings["audio_ratio"] * audio
    return kept / (video + audio)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_every_preset_builds(preset: Preset) -> None:
    for method in preset.methods:
        hidden_size = 16 if compressor_type(method).learned else None
        compressor = build_compressor(method, preset=preset.name, hidden_size=hidden_size)
        assert compressor.name == method
        for name, value in {**preset.settings, **preset.own.get(method, {})}.items():
            assert getattr(compressor.settings, name) == value


@pytest.mark.parametrize("preset", [p for p in PRESETS if p.window], ids=lambda preset: preset.name)
def test_ratios_of_the_modalities_give_the_total(preset: Preset) -> None:
    assert share(preset) == pytest.approx(preset.total, abs=0.03)


@pytest.mark.parametrize(
    ("names", "totals"),
    [
        ("seats/7b/{}", [0.3518, 0.2518, 0.1518, 0.1029]),
        ("seats/30b/{}", [0.3515, 0.2515, 0.1515, 0.1015]),
        ("seats/7b/{}-audio-intact", [0.3524, 0.2502]),
        ("seats/30b/{}-audio-intact", [0.3488, 0.2479, 0.1562]),
    ],
)
def test_pairs_of_seats_keep_what_its_windows_make_them_keep(names: str, totals: list[float]) -> None:
    found = [round(share(find_preset(names.format(percent))), 4) for percent in (35, 25, 15, 10)[: len(totals)]]
    assert found == totals


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_a_preset_says_where_it_comes_from(preset: Preset) -> None:
    paper, size, total = preset.name.split("/")
    assert preset.source.lower().startswith(paper)
    assert size in preset.backbone.lower()
    assert total.split("-")[0] in (f"{preset.total:.0%}"[:-1], "code", "scripts")
    assert preset.methods


def clip(window: tuple[int, int]) -> TokenLayout:
    """16 s of a source's clips."""
    video, audio = window
    spec = LayoutSpec(windows=8, rows=video // 32, columns=16, audio_per_window=audio)
    return make_layout(spec)


@pytest.mark.parametrize("preset", [p for p in PRESETS if p.window], ids=lambda preset: preset.name)
def test_clips_of_the_source_keep_the_total(preset: Preset) -> None:
    layout = clip(preset.window)
    for method in preset.methods:
        hidden_size = 16 if compressor_type(method).learned else None
        compressor = build_compressor(method, preset=preset.name, hidden_size=hidden_size)
        if isinstance(compressor, InnerCompressor):
            compressor = compressor.for_depth(48 if "30B" in preset.backbone else 28)
        budget = compressor.budget(layout)
        kept = budget.total[0] / layout.counts(*MEDIA)[0]
        assert kept == pytest.approx(preset.total, abs=0.03), method
        for modality in MEDIA:
            asked = preset.settings[f"{modality.name.lower()}_ratio"]
            assert budget.of(modality)[0] / layout.counts(modality)[0] == pytest.approx(asked, abs=0.01), method


@pytest.mark.parametrize("name", [n for n in list_presets() if "fastv" in str(find_preset(n).methods)])
def test_fastv_prunes_after_the_second_layer_on_both_backbones(name: str) -> None:
    """SEATS, section B.2; the depth alone would make it the third of 48."""
    preset = find_preset(name)
    for method in set(preset.methods) & {"fastv", "fastv_om"}:
        compressor = build_compressor(method, preset=name).for_depth(48 if "30B" in preset.backbone else 28)
        assert [cut.after for cut in compressor.cuts()] == [1]


def test_given_fields_win() -> None:
    settings = build_compressor("omnizip", preset="omnidrop/7b/20-omnizip", rho_max=0.8).settings
    assert (settings.video_ratio, settings.rho_min, settings.rho_max) == (0.15, 0.45, 0.8)


def test_a_ratio_replaces_all_ratios() -> None:
    settings = build_compressor("random", preset="seats/7b/35", retained_ratio=0.5).settings
    assert (settings.retained_ratio, settings.video_ratio, settings.audio_ratio) == (0.5, None, None)


def test_an_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(CompressorError, match="no preset is named 'seats/7b/30'; did you mean 'seats/7b/35'"):
        build_compressor("random", preset="seats/7b/30")


def test_a_preset_of_another_method_names_the_field() -> None:
    with pytest.raises(CompressorError, match="random has no setting 'rho_min'"):
        build_compressor("random", preset="omnidrop/7b/30-omnizip")
