"""What is wrong with a run shows before processes connect and the LLM is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2_5OmniConfig

from omnisieve.backbones import adapter_for, load_backbone
from omnisieve.backbones.loading import hidden_size_of
from omnisieve.config import TrainConfig
from omnisieve.training import USER_ERRORS, build, check_run
from tests.data.stock import BACKBONE, save_qwen3
from tests.models import HIDDEN, tiny_config
from tests.training.runs import OMNISIFT, make_config


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A run that could start."""

    def load(*_: Any) -> None:
        pytest.fail("the LLM is loaded")

    monkeypatch.setattr(build, "load_backbone", load)
    (tmp_path / "text.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    (tmp_path / "gone.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "<video>"}], "videos": ["gone.mp4"]}'
    )
    config = make_config(tmp_path / "run")
    config.model.path = str(BACKBONE)
    config.data.train = config.data.val = str(tmp_path / "text.jsonl")
    return config


def test_a_run_that_could_start_passes_and_has_its_folder(config: TrainConfig) -> None:
    check_run(config)
    assert list(Path(config.output_dir).iterdir()) == []


@pytest.mark.parametrize(
    ("name", "told"),
    [("best", "best exists and is no exported compressor; move it"), ("last", "run holds last of another run")],
)
def test_what_lies_where_a_run_exports_to_is_named_before_it_trains(config: TrainConfig, name: str, told: str) -> None:
    notes = Path(config.output_dir) / name / "notes.md"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with pytest.raises(USER_ERRORS, match=told):
        check_run(config)
    assert notes.read_text() == "mine"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("model.path", "/nowhere", "/nowhere is no folder that exists"),
        ("compressor", {**OMNISIFT, "widht": 3}, "unknown key 'widht'; the nearest valid key is 'width'"),
        ("compressor", {**OMNISIFT, "width": 15}, "width 15 is not a multiple of heads 2"),
        ("compressor", {"method": "omnisift", "preset": "omnisift/7b/36"}, "did you mean 'omnisift/7b/35'"),
        ("train.init_from", "runs/nowhere", "runs/nowhere is no exported compressor"),
        ("train.resume", "runs/nowhere", "runs/nowhere is no checkpoint"),
        ("data.train", "gone.jsonl", "gone.mp4"),
        ("data.val", "gone.jsonl", "gone.mp4"),
        ("data.feature_cache", "nowhere", "nowhere holds no finished feature cache"),
        ("output_dir", "/dev/null/run", "cannot write the configuration to /dev/null/run/config.yaml"),
    ],
)
def test_mistakes_show_at_once(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    section, _, name = key.rpartition(".")
    setattr(getattr(config, section) if section else config, name, value)
    with pytest.raises(USER_ERRORS) as error:
        check_run(config)
    assert told in str(error.value)


def test_a_model_without_a_processor_is_named(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((BACKBONE / "config.json").read_text())
    config.model.path = str(tmp_path / "model")
    with pytest.raises(USER_ERRORS, match="holds no processor"):
        check_run(config)


def test_the_width_is_known_without_the_weights(tmp_path: Path) -> None:
    for folder in (BACKBONE, save_qwen3(tmp_path / "qwen3")):
        assert hidden_size_of(folder) == adapter_for(load_backbone(folder)).hidden_size
    Qwen2_5OmniConfig(thinker_config=tiny_config().to_dict()).save_pretrained(tmp_path / "whole")
    assert hidden_size_of(tmp_path / "whole") == HIDDEN
