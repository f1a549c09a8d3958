"""From the compressor's section of a configuration to a compressor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from omnisieve.artifact import save_compressor
from omnisieve.backbones import adapter_for
from omnisieve.backbones.tuning import trainable
from omnisieve.compressors import CompressorError, build_compressor
from omnisieve.config import ConfigError, LlmSection, RatioSection, WarmStartSection
from omnisieve.trained_llm import read_tuned_llm
from omnisieve.training.build import make_compressor, make_teacher, make_trainable, start_llm
from tests.models import HIDDEN, tiny_thinker
from tests.trained import ATTENTION, export_tuned, lora_section
from tests.training.runs import OMNISIFT, make_config


def make(tmp_path: Path, section: dict, **train):
    config = make_config(tmp_path, **train)
    config.compressor = section
    return make_compressor(config, HIDDEN)


def test_fields_reach_the_method(tmp_path: Path):
    compressor = make(tmp_path, {**OMNISIFT, "retained_ratio": 0.35, "video_pruner": "similarity"})
    assert compressor.name == "omnisift"
    assert compressor.settings.retained_ratio == 0.35
    assert compressor.pruner is None


def test_a_preset_brings_its_ratios(tmp_path: Path):
    section = {name: value for name, value in OMNISIFT.items() if not name.endswith("ratio")}
    settings = make(tmp_path, {**section, "preset": "omnisift/7b/35"}).settings
    assert (settings.retained_ratio, settings.video_ratio, settings.audio_ratio) == (None, 0.33, 0.6)
    # As a command line takes away the ratio of a recipe.
    assert make(tmp_path, {**section, "preset": "omnisift/7b/35", "retained_ratio": None}).settings == settings


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({**OMNISIFT, "preset": "omnisift/7b/36"}, "omnisift/7b/35"),
        ({"method": "omnisft", "retained_ratio": 0.25}, "omnisift"),
        ({**OMNISIFT, "widht": 32}, "width"),
        ({**OMNISIFT, "width": "wide"}, "width"),
        ({"method": "random", "retained_ratio": 0.25}, "no parameters to train"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, section: dict, told: str):
    with pytest.raises((ConfigError, CompressorError), match=told):
        make(tmp_path, section)


def test_init_from_takes_weights_and_changed_settings(tmp_path: Path):
    fields = {name: value for name, value in OMNISIFT.items() if name != "method"}
    exported = build_compressor("omnisift", hidden_size=HIDDEN, **fields)
    folder = save_compressor(exported, tmp_path / "exported")
    section = {"method": "omnisift", "retained_ratio": 0.5}
    loaded = make(tmp_path, section, init_from=str(folder))
    assert loaded.settings.retained_ratio == 0.5
    assert loaded.settings.width == 16
    for name, value in exported.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_init_from_a_bfloat16_export_learns_in_float32(mode: Any, tmp_path: Path):
    fields = {name: value for name, value in OMNISIFT.items() if name != "method"}
    exported = build_compressor("omnisift", hidden_size=HIDDEN, **fields).to(torch.bfloat16)
    folder = save_compressor(exported, tmp_path / "exported")
    loaded = make(tmp_path, OMNISIFT, init_from=str(folder), llm=LlmSection(mode))
    expected = {name: value.float() for name, value in exported.state_dict().items()}
    torch.testing.assert_close(loaded.state_dict(), expected, rtol=0, atol=0)


def test_init_from_another_method_is_refused(tmp_path: Path):
    folder = save_compressor(build_compressor("random", retained_ratio=0.25), tmp_path / "exported")
    with pytest.raises(ConfigError, match="holds random"):
        make(tmp_path, {"method": "omnisift"}, init_from=str(folder))


def test_init_from_another_width_is_refused(tmp_path: Path):
    exported = build_compressor("omnisift", hidden_size=HIDDEN + 1, retained_ratio=0.25)
    folder = save_compressor(exported, tmp_path / "exported")
    with pytest.raises(ConfigError, match=rf"is for hidden size {HIDDEN + 1}, but tiny has {HIDDEN}"):
        make(tmp_path, {"method": "omnisift"}, init_from=str(folder))


def test_init_from_a_method_makes_it_the_base(tmp_path: Path):
    section = {**OMNISIFT, "base_settings": {"audio_novelty": 0.3}}
    settings = make(tmp_path, section, init_from="stvp").settings
    assert (settings.base, settings.base_settings) == ("stvp", {"audio_novelty": 0.3})
    assert make(tmp_path, {**OMNISIFT, "base": "omnizip"}).settings.base == "omnizip"


def test_a_folder_named_like_a_method_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    fields = {name: value for name, value in OMNISIFT.items() if name != "method"}
    save_compressor(build_compressor("omnisift", hidden_size=HIDDEN, **fields), tmp_path / "stvp")
    assert make(tmp_path, OMNISIFT, init_from="stvp").settings.base == "stvp"
    assert make(tmp_path, OMNISIFT, init_from="./stvp").settings.base is None


def test_an_export_is_gone_on_from_with_its_base(tmp_path: Path):
    fields = {name: value for name, value in OMNISIFT.items() if name != "method"}
    exported = build_compressor("omnisift", hidden_size=HIDDEN, base="omnizip", **fields)
    folder = save_compressor(exported, tmp_path / "exported")
    assert make(tmp_path, {"method": "omnisift"}, init_from=str(folder)).settings.base == "omnizip"


@pytest.mark.parametrize(
    ("section", "start", "told"),
    [
        ({}, "stpv", r"train\.init_from: .*'stpv'; did you mean 'stvp'.*no folder stpv"),
        ({}, "runs/nowhere", "runs/nowhere is no exported compressor"),
        ({}, "full", "cannot be split"),
        ({"base": "omnizip"}, "stvp", r"init_from is stvp, compressor\.base omnizip"),
        ({"base_settings": {"audio_novelti": 0.1}}, "stvp", "audio_novelty"),
    ],
)
def test_what_cannot_be_started_from_is_named(tmp_path: Path, section: dict, start: str, told: str):
    with pytest.raises((ConfigError, CompressorError), match=told):
        make(tmp_path, {**OMNISIFT, **section}, init_from=start)


def test_a_method_inside_the_llm_becomes_the_teacher(tmp_path: Path):
    warm = WarmStartSection(steps=3, settings={"next_layer": True})
    config = make_config(tmp_path, init_from="seats", warm_start=warm)
    teacher = make_teacher(config)
    assert teacher.name == "seats"
    assert teacher.settings.next_layer
    assert make_compressor(config, HIDDEN).settings.base is None
    config.compressor["base"] = "stvp"
    assert make_compressor(config, HIDDEN).settings.base == "stvp"
    assert make_teacher(make_config(tmp_path, init_from="stvp")) is None


@pytest.mark.parametrize(
    ("start", "warm", "told"),
    [
        ("seats", {}, r"inside the LLM.* set train\.warm_start\.steps"),
        ("stvp", {"steps": 3}, r"name it in train\.init_from"),
        (None, {"steps": 3}, r"name it in train\.init_from"),
        ("seats", {"steps": 3, "settings": {"next_leyer": True}}, "next_layer"),
    ],
)
def test_what_cannot_be_taught_is_named(tmp_path: Path, start: str | None, warm: dict, told: str):
    config = make_config(tmp_path, init_from=start, warm_start=WarmStartSection(**warm))
    with pytest.raises((ConfigError, CompressorError), match=told):
        make_compressor(config, HIDDEN)


def test_a_warm_start_is_part_of_the_run(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"warm_start\.steps 5 is above train\.max_steps 4"):
        make_config(tmp_path, warm_start=WarmStartSection(steps=5))


def test_a_drawn_ratio_and_a_fixed_split_exclude_each_other(tmp_path: Path):
    config = make_config(tmp_path)
    config.compressor = {**OMNISIFT, "audio_ratio": 0.4}
    config.train.ratio = RatioSection(min=0.2, max=0.4)
    with pytest.raises(ConfigError, match=r"audio_ratio and train\.ratio exclude"):
        make_compressor(config, HIDDEN)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_an_llm_that_was_trained_goes_on_with_its_compressor(mode: Any, tmp_path: Path):
    folder, trained = export_tuned(tmp_path / "out", mode)
    lora = lora_section(dropout=0.3, targets=list(reversed(ATTENTION)))
    config = make_config(tmp_path, init_from=str(folder), llm=LlmSection(mode, lora=lora))
    make_compressor(config, HIDDEN)
    model = tiny_thinker()
    make_trainable(adapter_for(model), config.train.llm)
    start_llm(adapter_for(model), config)
    learning = trainable(adapter_for(model))
    tensors = read_tuned_llm(folder).tensors
    assert learning.keys() == tensors.keys()
    assert all(parameter.requires_grad and torch.equal(parameter, tensors[n]) for n, parameter in learning.items())
    ids = torch.arange(9, 60)[None]
    assert torch.equal(model.eval()(input_ids=ids).logits, trained(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("exported", "llm", "told"),
    [
        (
            "lora",
            LlmSection(),
            r"mode=lora\), here train\.llm\.mode is frozen: set lora .*--merge.*model\.path=OUT/model",
        ),
        ("full", LlmSection(), r"mode=full\), here train\.llm\.mode is frozen"),
        ("lora", LlmSection("full"), r"mode=lora\), here train\.llm\.mode is full"),
        ("full", LlmSection("lora"), r"mode=full\), here train\.llm\.mode is lora"),
        ("lora", LlmSection("lora", lora=lora_section(rank=8)), r"lora\.rank is 8, in .* it is 4"),
        ("lora", LlmSection("lora", lora=lora_section(targets=["q_proj"])), r"lora\.targets is \['q_proj'\]"),
    ],
)
def test_an_llm_that_cannot_go_on_is_refused_with_the_cure(exported: Any, llm: LlmSection, told: str, tmp_path: Path):
    folder, _ = export_tuned(tmp_path / "out", exported)
    with pytest.raises(ConfigError, match=told):
        make_compressor(make_config(tmp_path, init_from=str(folder), llm=llm), HIDDEN)


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_an_export_beside_a_frozen_llm_starts_any(mode: Any, tmp_path: Path):
    fields = {name: value for name, value in OMNISIFT.items() if name != "method"}
    exported = build_compressor("omnisift", hidden_size=HIDDEN, **fields)
    folder = save_compressor(exported, tmp_path / "out")
    config = make_config(tmp_path, init_from=str(folder), llm=LlmSection(mode))
    torch.testing.assert_close(make_compressor(config, HIDDEN).state_dict(), exported.state_dict(), rtol=0, atol=0)
    thinker, stock = tiny_thinker(), tiny_thinker()
    start_llm(adapter_for(thinker), config)
    torch.testing.assert_close(thinker.state_dict(), stock.state_dict(), rtol=0, atol=0)
