"""`train.py` as users start it, on real clips and the shipped LLM."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.data.stock import save_qwen3
from tests.distributed.programs import (
    arguments,
    assert_complete,
    finish,
    free_port,
    largest_difference,
    start,
    train,
    two_ranks,
)


def test_a_single_process_needs_no_launcher(clips: Path, tmp_path: Path):
    status, output = train(*arguments(clips, tmp_path / "run"))
    assert status == 0, output
    assert "Best step 2 of 2, validation loss " in output
    assert f"  tensorboard --logdir {tmp_path}/run/tensorboard" in output
    told = (
        "checking data/testbed/backbone",
        "loading data/testbed/backbone",
        "parameters, of which",
        "the first step took",
    )
    assert [output.count(text) for text in told] == [1] * len(told)
    assert sorted(told, key=output.index) == list(told)
    assert_complete(tmp_path / "run", 2)


@pytest.mark.slow
def test_qwen3_from_a_feature_cache(clips: Path, tmp_path: Path):
    backbone, cache = save_qwen3(tmp_path / "qwen3"), tmp_path / "cache"
    overrides = (f"model.path={backbone}", f"data.feature_cache={cache}", "train.distill_weight=0.5")
    words = arguments(clips, tmp_path / "run", *overrides)
    status, output = finish(start([sys.executable, "tools/cache_features.py", *words]))
    assert status == 0, output
    status, output = train(*words)
    assert status == 0, output
    assert_complete(tmp_path / "run", 2)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.learning_rate=1", "unknown key 'train.learning_rate'"),
        ("train.resume=nowhere", "nowhere is no checkpoint"),
        ("output_dir=/dev/null/run", "cannot write the configuration to /dev/null/run/config.yaml: Not a directory"),
    ],
)
def test_mistakes_end_with_one_message(clips: Path, tmp_path: Path, override: str, told: str):
    status, output = train(*arguments(clips, tmp_path / "run", override))
    assert status == 1
    (message,) = (line for line in output.splitlines() if line.startswith("train.py: "))
    assert told in message
    assert "Traceback" not in output


def test_help_names_every_key_without_a_configuration():
    status, output = train("--help")
    assert status == 0
    assert "train.estimator.route" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [("deepspeed.launcher.runner", "--num_gpus", "2"), ("torch.distributed.run", "--nproc_per_node", "2")],
    ids=["deepspeed", "torchrun"],
)
def test_launchers(clips: Path, tmp_path: Path, launcher: tuple[str, ...]):
    port = f"--master_port={free_port()}"
    command = [sys.executable, "-m", *launcher, port, "train.py", *arguments(clips, tmp_path / "run")]
    status, output = finish(start(command))
    assert status == 0, output
    assert_complete(tmp_path / "run", 2)


@pytest.mark.slow
def test_25_and_25_steps_are_50(clips: Path, tmp_path: Path):
    options = ("train.max_steps=50", "train.eval_every=25", "train.estimator.candidates=0.5")
    for folder, *more in (("whole",), ("parts", "train.stop_at=25"), ("parts",)):
        for status, output in two_ranks(*arguments(clips, tmp_path / folder, *options, *more)):
            assert status == 0, output
    assert largest_difference(tmp_path / "whole", tmp_path / "parts") == 0


@pytest.mark.slow
def test_60_of_60_runs_end_well(clips: Path, tmp_path: Path):
    """Library threads abort now and then at exit; a run that did its work must still exit with 0."""
    ends = []
    for number in range(60):
        options = ("train.eval_every=0", "train.save_every=0")
        ends += two_ranks(*arguments(clips, tmp_path / str(number), *options))
    bad = [output[-2000:] for status, output in ends if status != 0]
    assert not bad, f"{len(bad)} of {len(ends)} processes: {bad[0]}"
    assert len(ends) == 120
