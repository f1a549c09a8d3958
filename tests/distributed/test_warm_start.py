"""A run whose first steps are a warm start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omnisieve.config import WarmStartSection
from omnisieve.training.distributed import Ranks
from tests.distributed.launch import run_distributed
from tests.training.runs import compressor_of, make_config, make_trainer

pytestmark = pytest.mark.slow  # what a warm start teaches is tested without ranks in tests/training
WARM, STEPS = 3, 5


def run(ranks: Ranks, folder: Path, **train: Any) -> dict[str, Tensor]:
    """Train, and return the compressor's parameters."""
    options: dict[str, Any] = {"init_from": "fastv_om", "warm_start": WarmStartSection(steps=WARM), "max_steps": STEPS}
    options |= {"log_every": 2, "save_total_limit": 3}
    trainer = make_trainer(make_config(folder, **(options | train)), ranks)
    trainer.fit()
    return compressor_of(trainer)


def job(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """All runs of one number of ranks."""
    found = {"whole": run(ranks, folder / "whole", save_every=2, eval_every=2, micro_batch_size=2 // ranks.world_size)}
    if ranks.world_size == 1:
        middle = folder / "whole" / "checkpoints" / "checkpoint-2"
        found["resumed"] = run(ranks, folder / "resumed", resume=str(middle), eval_every=2, micro_batch_size=2)
        found["cold"] = run(ranks, folder / "cold", init_from=None, warm_start=WarmStartSection(), micro_batch_size=2)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[dict[str, Any]]]]:
    folders = {size: tmp_path_factory.mktemp(f"ranks{size}") for size in (1, 2)}
    return {size: (folder, run_distributed(job, folder, world_size=size)) for size, folder in folders.items()}


def test_the_record_tells_one_from_the_other(results):
    folder, _ = results[1]
    lines = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    trained = {line["step"]: line for line in lines if "seconds/step" in line}
    assert list(trained) == [2, WARM, 4, STEPS]
    for step, line in trained.items():
        assert ("train/agreement" in line) == (step <= WARM)
        assert ("train/cross_entropy" in line) == (step > WARM)
        assert 0.2 < line["ratio/total"] < 0.3
    assert trained[WARM]["train/order_loss"] > 0
    assert any("val/loss" in line for line in lines)


def test_a_warm_start_goes_on_where_it_was_interrupted(results):
    (found,) = results[1][1]
    torch.testing.assert_close(found["resumed"], found["whole"], rtol=0, atol=0)
    assert any(not torch.equal(found["whole"][name], value) for name, value in found["cold"].items())


def test_two_ranks_are_one(results):
    one, (two, other) = results[1][1][0]["whole"], (rank["whole"] for rank in results[2][1])
    torch.testing.assert_close(two, other, rtol=0, atol=0)
    # A bias that shifts all logits alike has a gradient of rounding errors, and Adam blows it up; so it does with a
    # single element of the rest.
    for name, value in one.items():
        if not name.endswith("bias"):
            assert (two[name] - value).norm() < 1e-2 * value.norm(), name
