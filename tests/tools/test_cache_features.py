"""`tools/cache_features.py`: what was cached answers as what is decoded, statistics included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import cache_features

from omnisieve.backbones import Adapter, BackboneError, feature_name
from omnisieve.compressors import build_compressor
from omnisieve.config import ConfigError, EvalConfig, TrainConfig, read_config
from omnisieve.data.feature_cache import FeatureCacheError
from omnisieve.data.synthetic import manifest_text, write_clip
from omnisieve.evaluation.evaluate import evaluate
from omnisieve.training.errors import TrainingError

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


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "index.json").read_text())


def needed(*methods: str) -> set[str]:
    """Names of the statistics that methods need."""
    return {feature_name(need) for name in methods for need in build_compressor(name, retained_ratio=0.35).needs}


def test_a_cache_holds_the_statistics_of_its_recipe_and_is_kept(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = index_of(recipe.parent / "cache")
    assert all(set(entry["tensors"]) == needed(*METHODS) | {"video", "audio"} for entry in index["entries"].values())
    assert cache_features.main(["--config", str(recipe), "methods=[random,omnizip]"]) == 0
    assert "0 files encoded, 2 were there already, 0 could not be read" in capsys.readouterr().out
    assert index_of(recipe.parent / "cache") == index


def test_other_statistics_are_added_to_the_features(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(recipe.parent / "cache", tmp_path / "cache")
    words = ["methods=[omnizip]", "settings.omnizip.scope=file", f"data.feature_cache={folder}"]
    with pytest.raises(BackboneError, match=r"hold no 'audio/attention_received\.global'.*cache them again"):
        evaluate(read_config(EvalConfig, recipe, words))
    features = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert cache_features.main(["--config", str(recipe), *words]) == 0
    assert "2 files encoded, 0 were there already" in capsys.readouterr().out
    # Statistics are one number for each token, features are many.
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 1.1 * features
    entries = index_of(folder)["entries"].values()
    names = needed(*METHODS) | {"audio/attention_received.global", "video", "audio"}
    assert all(set(entry["tensors"]) == names for entry in entries)


def test_processes_share_the_files_and_go_on_where_they_were_killed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four files, one of which is no clip: two processes, one of them killed at its second file; then one alone."""
    write_clip(("a", "val", 2, str(recipe.parent / "videos")))
    lines = manifest_text("a", "val", 3).splitlines()
    lines.insert(1, lines[0].replace("videos/a_val_00000.mp4", "bad.mp4"))
    (recipe.parent / "bad.mp4").write_text("this is no clip")
    manifest = recipe.parent / "four.jsonl"
    manifest.write_text("\n".join(lines))
    words = ["--config", str(recipe), f"manifest={manifest}", f"data.feature_cache={tmp_path / 'cache'}"]
    config, cpu = cache_features.load_recipe([*words, "methods=[random]"]), torch.device("cpu")
    monkeypatch.setattr(cache_features, "SHARD_BYTES", 1)
    assert cache_features.fill(config, cache_features.Process(1, 2, cpu, "a")) == 0
    encode, calls = Adapter.encode, []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "encode", killed)
        with pytest.raises(KeyboardInterrupt):
            cache_features.fill(config, cache_features.Process(0, 2, cpu, "a"))
    capsys.readouterr()
    assert not (tmp_path / "cache" / "index.json").exists()
    assert cache_features.main([*words, "methods=[random]"]) == 0
    told = capsys.readouterr()
    assert "1 files encoded, 2 were there already, 1 could not be read" in told.out
    assert "bad.mp4: container:" in told.err
    index = index_of(tmp_path / "cache")
    assert len(index["entries"]) == 3
    assert len(index["unreadable"]) == 1
    assert not list((tmp_path / "cache").glob(".run-*"))
    # Without anything to do, too, the bad file is named.
    for rank in (1, 0):
        assert cache_features.fill(config, cache_features.Process(rank, 2, cpu, "b")) == 0
    told = capsys.readouterr()
    assert "0 files encoded, 3 were there already, 1 could not be read" in told.out
    assert "bad.mp4: container:" in told.err
    assert index_of(tmp_path / "cache")["entries"].keys() == index["entries"].keys()


def test_another_format_is_refused_by_its_name(recipe: Path) -> None:
    with pytest.raises(FeatureCacheError, match=r"data\.feature_cache_dtype: cached 'float32', asked 'int8'"):
        cache_features.main(["--config", str(recipe), "data.feature_cache_dtype=int8"])


def test_each_process_has_an_accelerator_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    assert [cache_features.find_device(rank) for rank in range(2)] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert chosen == [0, 1]
    with pytest.raises(TrainingError, match=r"process 2 .* there are 2: .*--nproc_per_node 2"):
        cache_features.find_device(2)


def test_the_folder_must_be_named(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.feature_cache is not set"):
        cache_features.main(["--config", str(recipe), "data.feature_cache=null"])


def test_recipes_of_training_and_of_evaluation_are_told_apart() -> None:
    training, evaluation = (
        ["--config", str(ROOT / "recipes" / name)] for name in ("quickstart.yaml", "eval_testbed.yaml")
    )
    assert isinstance(cache_features.load_recipe(training), TrainConfig)
    assert isinstance(cache_features.load_recipe(evaluation), EvalConfig)
