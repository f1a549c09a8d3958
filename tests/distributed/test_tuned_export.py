"""From a run that tunes the LLM, too, over its exports to evaluations, by the programs as users start them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.distributed.programs import arguments, finish, free_port, start

pytestmark = pytest.mark.slow

# A rate at which so few steps change answers.
LORA = ("train.llm.mode=lora", "train.llm.lr=2e-2", "train.llm.lora.rank=4")


def program(*words: str | Path) -> str:
    """What a program that must succeed says."""
    status, output = finish(start([sys.executable, *map(str, words)]))
    assert status == 0, output
    return output


def answers(clips: Path, output_dir: Path, methods: list[str], *overrides: str) -> dict[str, dict[str, str]]:
    """What each method answers, by question."""
    words = [f"manifest={clips / 'val.jsonl'}", f"output_dir={output_dir}", "data.workers=0", "questions_per_clip=6"]
    words += [f"methods=[{','.join(methods)}]", "ratios=[0.25]", "bootstrap=10", *overrides]
    program("eval.py", "--config", "recipes/eval_testbed.yaml", *words)
    found: dict[str, dict[str, str]] = {}
    for line in map(json.loads, (output_dir / "predictions.jsonl").read_text().splitlines()):
        found.setdefault(line["method"], {})[line["question"]] = line["predicted"]
    return found


def test_adapters_apart_and_merged_answer_alike(clips: Path, tmp_path: Path):
    run, apart, merged = (tmp_path / name for name in ("run", "apart", "merged"))
    options = (*LORA, "train.zero_stage=3", "train.max_steps=4", "train.warmup_ratio=0")
    launcher = ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", f"--master_port={free_port()}", "train.py")
    program(*launcher, *arguments(clips, run, *options))
    program("tools/export.py", run, apart, "--which", "last")
    said = program("tools/export.py", run, merged, "--which", "last", "--merge", "--dtype", "float32")
    assert "reading it back ..." in said

    borrowed = ("settings.borrowed.method=full", f"settings.borrowed.llm={apart}")
    one = answers(clips, tmp_path / "eval_apart", ["full", str(apart), "borrowed"], *borrowed)
    other = answers(clips, tmp_path / "eval_merged", ["full", str(merged)], f"model.path={merged / 'model'}")
    assert one[str(apart)] == other[str(merged)]
    assert one["borrowed"] == other["full"]
    # The comparison could have failed: the stock LLM says something else.
    assert one["full"] != one["borrowed"]
    assert len(one["full"]) == 18
    methods = json.loads((tmp_path / "eval_apart" / "report.json").read_text())["methods"]
    assert methods["full"]["llm"] == "data/testbed/backbone"
    for label in (str(apart), "borrowed"):
        assert methods[label]["llm"] == f"data/testbed/backbone with the adapters of {apart}"
