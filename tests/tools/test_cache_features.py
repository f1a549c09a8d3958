"""`tools/cache_features.py`: what was cached answers as what is decoded, statistics included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tools import cache_features

from omnisieve.backbones import BackboneError, feature_name
from omnisieve.compressors import build_compressor
from omnisieve.config import EvalConfig, TrainConfig, read_config
from omnisieve.data.feature_cache import FeatureCacheError
from omnisieve.data.synthetic import manifest_text, write_clip
from omnisieve.evaluation.evaluate import evaluate

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
model: {{path: {backbone}, dtype: float32}}
data: {{feature_cache: {folder}/cache, workers: 0}}
manifest: {folder}/val.jsonl
methods: [visionzip_om, omnizip]
ratios: [0.35]
max_new_tokens: 4
output_dir: {folder}/out
"""
METHODS = ["omnizip", "visionzip_om"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluates two methods that need statistics on two clips of the testbed, one question each."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "videos").mkdir()
    for index in range(2):
        write_clip(("a", "val", index, str(folder / "videos")))
    lines = [json.loads(line) for line in manifest_text("a", "val", 2).splitlines()]
    for line in lines:
        line["messages"] = line["messages"][:2]
    (folder / "val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = folder / "eval.yaml"
    path.write_text(RECIPE.format(folder=folder, backbone=ROOT / "data" / "testbed" / "backbone"))
    assert cache_features.main(["--config", str(path)]) == 0
    return path


def test_methods_answer_from_the_cache_as_from_the_files(recipe: Path) -> None:
    cached, decoded = (
        evaluate(read_config(EvalConfig, recipe, overrides))[1] for overrides in ([], ["data.feature_cache=null"])
    )
    assert {cell.method for cell in cached} == set(METHODS)
    assert all(len(cell.answers) == 2 for cell in cached)
    assert [cell.answers for cell in cached] == [cell.answers for cell in decoded]


def test_a_cache_names_its_statistics_and_is_kept(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = json.loads((recipe.parent / "cache" / "index.json").read_text())
    needed = {feature_name(need) for name in METHODS for need in build_compressor(name, retained_ratio=0.35).needs}
    assert set(index["statistics"]) == needed
    assert all(set(entry["tensors"]) == needed | {"video", "audio"} for entry in index["entries"].values())
    assert cache_features.main(["--config", str(recipe), "methods=[random,omnizip]"]) == 0
    assert "holds all 2 files already" in capsys.readouterr().out


def test_other_statistics_must_be_cached_anew(recipe: Path) -> None:
    overrides = ["methods=[omnizip]", "settings.omnizip.scope=file"]
    with pytest.raises(FeatureCacheError, match=r"lacks the statistics audio/attention_received\.global; remove it"):
        cache_features.main(["--config", str(recipe), *overrides])
    with pytest.raises(BackboneError, match=r"hold no 'audio/attention_received\.global'.*cache them again"):
        evaluate(read_config(EvalConfig, recipe, overrides))


def test_recipes_of_training_and_of_evaluation_are_told_apart() -> None:
    training, evaluation = (
        ["--config", str(ROOT / "recipes" / name)] for name in ("quickstart.yaml", "eval_testbed.yaml")
    )
    assert isinstance(cache_features.load_recipe(training), TrainConfig)
    assert isinstance(cache_features.load_recipe(evaluation), EvalConfig)
