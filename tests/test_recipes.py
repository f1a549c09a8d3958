"""Every recipe that ships must be loadable, and must say how it is launched."""

import re
import shlex
from pathlib import Path
from typing import get_type_hints

import pytest

from omnisieve.compressors import Compressor, Settings, compressor_type
from omnisieve.config import EvalConfig, TrainConfig, check_fields, load_config, read_config
from omnisieve.evaluation.methods import resolve_methods

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SCHEMAS = {"train.py": TrainConfig, "eval.py": EvalConfig}


def launch_line(recipe: Path) -> list[str]:
    first = recipe.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# "), f"{recipe.name}: the first line must be the launch line, as a comment"
    return shlex.split(first[2:])


def build_methods(config: EvalConfig) -> list[Compressor]:
    methods = resolve_methods(config.methods, config.settings)
    return [method.build(ratio) for method in methods for ratio in method.ratios(config.ratios)]


def settings_of(config: TrainConfig) -> Settings:
    fields = dict(config.compressor)
    kind = compressor_type(fields.pop("method")).settings_type
    return kind(**check_fields(fields, get_type_hints(kind), "compressor"))


def test_there_are_recipes():
    assert {"quickstart.yaml", "omnisift_qwen2_5_omni_7b.yaml", "eval_testbed.yaml"} <= {r.name for r in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_is_valid_and_its_launch_line_works(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    words = launch_line(recipe)
    script = next((word for word in words if word in SCHEMAS), None)
    assert script, f"{recipe.name}: the launch line starts neither train.py nor eval.py"
    arguments = words[words.index(script) + 1 :]
    assert arguments[:2] == ["--config", recipe.relative_to(ROOT).as_posix()]
    assert len(arguments) > 2, f"{recipe.name}: the launch line must show an override"
    config = read_config(SCHEMAS[script], recipe)
    assert load_config(SCHEMAS[script], arguments)
    assert settings_of(config) if isinstance(config, TrainConfig) else build_methods(config)


def test_released_models_are_trained_and_evaluated_under_one_named_protocol():
    keys = ("protocol", "fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")
    for recipe in RECIPES:
        schema = EvalConfig if "methods:" in recipe.read_text(encoding="utf-8") else TrainConfig
        config = read_config(schema, recipe)
        if config.model.path.startswith("Qwen/"):
            assert [getattr(config.data, key) for key in keys] == ["omnisift", *[None] * 6]
        else:
            assert config.data.protocol is None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_names_no_place_of_one_machine(recipe: Path):
    assert not re.search(r"(?:^|[\s:=])[/~]\w", recipe.read_text(encoding="utf-8"), flags=re.MULTILINE)
