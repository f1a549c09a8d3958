"""A run ends with what it left and what to do next."""

from __future__ import annotations

from pathlib import Path

import pytest

from omnisieve.artifact import save_compressor
from omnisieve.compressors import build_compressor
from omnisieve.config import EvalConfig, TrainConfig, read_config
from omnisieve.training.checkpoint import BEST, LAST
from omnisieve.training.ending import summary
from tests.training.runs import make_config


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Of a run of 4 steps that has done them."""
    config = make_config(tmp_path / "run")
    save_compressor(build_compressor("random", retained_ratio=0.5), tmp_path / "run" / LAST, card={"steps": 4})
    return config


def test_the_best_step_and_its_loss(config: TrainConfig, tmp_path: Path) -> None:
    card = {"steps": 2, "validation loss": 0.5}
    save_compressor(build_compressor("random", retained_ratio=0.5), tmp_path / "run" / BEST, card=card)
    lines = summary(config).splitlines()
    assert lines[0] == f"Best step 2 of 4, validation loss 0.5000: {tmp_path}/run/best"
    assert lines[1] == ""
    assert f"  tensorboard --logdir {tmp_path}/run/tensorboard" in lines


def test_a_run_without_validation_or_with_steps_left_says_so(config: TrainConfig, tmp_path: Path) -> None:
    assert summary(config).splitlines()[0] == f"Not validated; {tmp_path}/run/last holds step 4 of 4."
    config.train.max_steps = 9
    assert summary(config).splitlines()[1] == "The run has 5 steps left; the same command goes on."
    config.train.stop_at = 4
    assert "the same command without train.stop_at goes on" in summary(config)
    config.output_dir = str(tmp_path / "nothing")
    assert summary(config) == f"Ended before the first step; {tmp_path}/nothing holds no compressor."


def test_the_evaluation_is_one_that_eval_reads(config: TrainConfig) -> None:
    (command,) = (line for line in summary(config).splitlines() if "eval.py" in line)
    overrides = [word.replace("'", "") for word in command.split() if "=" in word]
    read = read_config(EvalConfig, "recipes/eval_testbed.yaml", overrides)
    assert read.methods[-1] == f"{config.output_dir}/export"
