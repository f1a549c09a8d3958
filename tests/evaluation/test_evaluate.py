"""From mp4 files and a configuration to a report, with the shipped backbone."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from omnisieve.artifact import save_compressor
from omnisieve.compressors import base, build_compressor
from omnisieve.config import EvalConfig, MediaSection
from omnisieve.data.manifest import Manifest, ManifestError
from omnisieve.data.synthetic import manifest_text, write_clip
from omnisieve.evaluation.benchmarks import with_questions
from omnisieve.evaluation.evaluate import USER_ERRORS, evaluate, open_benchmark
from tests.data.stock import BACKBONE, save_qwen3

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of the testbed, each with its first four questions, and a third whose file is cut short."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "videos").mkdir()
    names = [write_clip(("a", "val", index, str(folder / "videos"))) for index in range(3)]
    lines = [json.loads(line) for line in manifest_text("a", "val", 3).splitlines()]
    for line in lines:
        line["messages"] = line["messages"][:8]
    (folder / "val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    broken = folder / "videos" / names[2]
    broken.write_bytes(broken.read_bytes()[:5000])
    return folder / "val.jsonl"


@pytest.fixture
def config(manifest: Path, tmp_path: Path) -> EvalConfig:
    config = EvalConfig(
        manifest=str(manifest), methods=["random", "full", "oracle"], ratios=[0.25], output_dir=str(tmp_path / "out")
    )
    config.model.path = str(ROOT / "data" / "testbed" / "backbone")
    config.model.dtype = "float32"
    config.data.workers = 0
    config.max_new_tokens = 4
    return config


def test_report_of_real_files(config: EvalConfig) -> None:
    report, _ = evaluate(config)
    rows = report["rows"]
    assert [(row["method"], row["retained_ratio"]) for row in rows] == [
        ("full", 1.0),
        ("random", 0.25),
        ("oracle", 0.25),
    ]
    for row in rows:
        assert (row["n_questions"], row["n_clips"], row["n_failures"]) == (8, 2, 4)
        assert row["measured_ratio"]["total"] == pytest.approx(row["retained_ratio"], abs=0.01)
    assert len(report["failures"]) == 1
    assert "truncated" in report["failures"][0]["error"]
    assert report["environment"]["hearing_test"]["passed"]
    assert report["environment"]["seeing_test"]["passed"]
    assert json.loads(json.dumps(report))["methods"]["random"]["kind"] == "training-free"
    protocol = report["environment"]["protocol"]
    resolved = {
        "name": "processor", "placement": "steps", "fps": 2.0, "min_frames": 1, "max_frames": 768, "min_pixels": 3136,
        "max_pixels": 602_112, "total_pixels": None, "min_image_pixels": 3136, "max_image_pixels": 602_112,
        "audio_seconds": 300.0,
    }  # fmt: skip
    assert resolved.items() <= protocol.items()


def test_a_question_that_cannot_be_asked_costs_no_other(
    config: EvalConfig, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[0]["messages"][2]["content"] += " <|vision_bos|>"
    lines[1]["messages"][0]["content"] += [{"type": "image", "image": "thin.png"}]
    Image.new("RGB", (3000, 4)).save(manifest.parent / "thin.png")
    config.manifest = str(manifest.with_name("marked.jsonl"))
    Path(config.manifest).write_text("".join(json.dumps(line) + "\n" for line in lines))
    report, _ = evaluate(config)
    for row in report["rows"]:
        assert (row["n_questions"], row["n_clips"], row["n_failures"]) == (3, 1, 9)
    errors = {Path(failure["clip"].split()[0]).name: failure["error"] for failure in report["failures"]}
    assert len(errors) == len(report["failures"]) == 3
    told = " ".join(errors.values())
    assert "the text holds <|vision_bos|>" in told
    assert "ValueError: absolute aspect ratio must be smaller than 200" in told
    assert "truncated" in told
    assert "1 of 3 samples cannot be used: line 1: the text holds <|vision_bos|>" in capsys.readouterr().err


def test_report_of_real_files_with_qwen3(config: EvalConfig, tmp_path: Path) -> None:
    config.model.path = str(save_qwen3(tmp_path / "qwen3"))
    config.methods, config.also = ["random", "full"], ["omnizip"]
    report, cells = evaluate(config)
    assert [row["measured_ratio"]["total"] for row in report["rows"]] == pytest.approx([1, 0.25, 0.25], abs=0.01)
    # 12 s of sound, of which the shipped backbone makes 300 tokens.
    assert cells[0].answers[0].present[1] == 12 * 13
    assert report["environment"]["hearing_test"]["passed"]
    assert report["environment"]["seeing_test"]["passed"]


def without_weights(folder: Path) -> str:
    """A model that cannot be loaded."""
    model = folder / "model"
    shutil.copytree(BACKBONE, model, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(model)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("settings", {"random": {"sead": 3}}, "random has no setting 'sead'; did you mean 'seed'"),
        ("settings", {"random": {"retained_ratio": "0.3"}}, "random: retained_ratio is '0.3', of type str"),
        ("settings", {"oracle": {"at": {0.25: {"seed": 1}}}}, "oracle has no setting 'seed'"),
        ("also", ["narrow/"], "narrow/ is for hidden size 8, the model has 128"),
        ("manifest", "unanswered.jsonl", "no user turn that is followed by an answer"),
        ("data", MediaSection(feature_cache="nowhere"), "nowhere holds no finished feature cache"),
    ],
)
def test_mistakes_show_before_the_model_is_loaded(
    config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config.model.path = without_weights(tmp_path)
    save_compressor(build_compressor("omnisift", hidden_size=8, retained_ratio=0.25), tmp_path / "narrow")
    (tmp_path / "unanswered.jsonl").write_text('{"messages": [{"role": "user", "content": "Why?"}]}')
    setattr(config, key, value)
    with pytest.raises(USER_ERRORS) as error:
        evaluate(config)
    assert told in str(error.value)


def test_missing_media_show_before_the_model_is_loaded(config: EvalConfig, tmp_path: Path) -> None:
    config.manifest, config.model.path = str(tmp_path / "m.jsonl"), without_weights(tmp_path)
    question = {"role": "user", "content": "<video>What?"}
    Path(config.manifest).write_text(json.dumps({"messages": [question], "videos": ["gone.mp4"]}))
    with pytest.raises(ManifestError, match=r"gone\.mp4"):
        open_benchmark(config)


def test_questions_are_asked_alone(config: EvalConfig) -> None:
    """A prompt holds the media, its own question and no other question or answer."""
    _, benchmark = open_benchmark(config)
    clip = benchmark[0]
    asked = benchmark.decode(clip.questions[2].input_ids[None])[0]
    assert clip.questions[2].meta["question"] in asked
    assert not any(q.meta["question"] in asked for q in clip.questions if q.meta["turn"] != 2)
    assert asked.rstrip().endswith("assistant")


def test_only_the_first_questions_of_a_clip(config: EvalConfig) -> None:
    whole = open_benchmark(config)[1][0]
    config.questions_per_clip = 2
    clip = open_benchmark(config)[1][0]
    assert clip.n_questions == 2
    assert [q.meta["question"] for q in clip.questions] == [q.meta["question"] for q in whole.questions[:2]]


def test_lines_with_the_same_id_are_different_questions(config: EvalConfig) -> None:
    line = Manifest(config.manifest)[0]
    twice = Path(config.manifest).with_name("twice.jsonl")
    twice.write_text("\n".join(Path(config.manifest).read_text().splitlines()[:1] * 2))
    assert [c.id for c in with_questions("b", Manifest(twice))] == [line.id, f"{line.id} (line 2)"]
    with pytest.raises(ManifestError, match="two lines have the id"):
        with_questions("b", [line, line])


def test_command_line(config: EvalConfig, manifest: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    assert run_eval(manifest, tmp_path / "out", monkeypatch) == 0
    assert "| no_media | 0% |" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "eval.yaml", "predictions.jsonl", "report.json", "report.md",
    ]  # fmt: skip


def test_nothing_answered_ends_with_an_error_and_a_report(manifest: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    only = manifest.with_name("broken.jsonl")
    only.write_text(manifest.read_text().splitlines()[2])
    assert run_eval(only, tmp_path / "out", monkeypatch) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("eval.py: ")
    assert "no_media" in told
    assert "truncated" in told
    (row,) = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert row["status"] != "ok"


def test_the_method_of_the_guide_is_evaluated_from_outside_the_package(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CONTRIBUTING.md shows a whole method in at most 40 lines."""
    (source,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(source.splitlines()) <= 40
    plugin = tmp_path / "loudest.py"
    plugin.write_text(source)
    # What it registers is gone after this test.
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    overrides = [f"plugins=[{plugin}]", "methods=[random,loudest]", "ratios=[0.25]", "settings.loudest.order=1"]
    assert run_eval(manifest, tmp_path / "out", monkeypatch, *overrides) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    row = next(row for row in report["rows"] if row["method"] == "loudest")
    assert (row["status"], row["n_questions"]) == ("ok", 4)
    assert row["measured_ratio"]["total"] == pytest.approx(0.25, abs=0.01)
    assert report["methods"]["loudest"]["settings"] == {"order": 1}


def run_eval(manifest: Path, output_dir: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    """Exit status of `eval.py` on the first line of a manifest."""
    monkeypatch.chdir(ROOT)
    arguments = [
        "eval.py", "--config", "recipes/eval_testbed.yaml", f"manifest={manifest}", "limit=1", "data.workers=0",
        f"output_dir={output_dir}", *(overrides or ["methods=[no_media]"]),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("eval.py", run_name="__main__")
    return int(stop.value.code or 0)
