"""Training on one and on two ranks of DeepSpeed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omnisieve.config import EstimatorSection, RatioSection
from omnisieve.training.distributed import Ranks
from tests.distributed.launch import run_distributed
from tests.training.clips import lasting
from tests.training.runs import VAL_BATCHES, compressor_of, make_config, make_trainer

# The same four clips per step, in every way that one rank and two ranks can take them.
SPREADS = {
    1: {"batch of 4": (4, 1), "4 accumulations": (1, 4), "2 x 2": (2, 2)},
    2: {"2 ranks x 2": (2, 1), "2 ranks x 2 accumulations": (1, 2)},
}
GROUPED = ("2 x 2", "2 ranks x 2", "2 ranks x 2 accumulations")
PEAK = 1e-2


def run(ranks: Ranks, folder: Path, **train: Any) -> dict[str, Tensor]:
    """Train, and return the compressor's parameters."""
    trainer = make_trainer(make_config(folder, lr=PEAK, **train), ranks)
    trainer.fit()
    return compressor_of(trainer)


def first_step(ranks: Ranks, folder: Path, **train: Any) -> list[Tensor]:
    """This rank's shard of Adam's first moment after one step, by parameter group: the clipped gradient, times 0.1."""
    trainer = make_trainer(make_config(folder, max_steps=1, eval_every=1, **train), ranks)
    trainer.fit()
    optimizer = trainer.engine.optimizer.optimizer
    return [optimizer.state[group["params"][0]]["exp_avg"].clone() for group in optimizer.param_groups]


def job(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """All runs of one number of ranks: starting processes costs more than the runs."""
    found: dict[str, Any] = {}
    for name, (size, accumulate) in SPREADS[ranks.world_size].items():
        options = {"micro_batch_size": size, "gradient_accumulation_steps": accumulate}
        found[name] = first_step(ranks, folder / name, max_grad_norm=1e9, **options)
        if name in GROUPED:
            by_length = {**options, "group_by_length": "yes"}
            found[f"{name}, grouped"] = first_step(ranks, folder / f"{name}, grouped", max_grad_norm=1e9, **by_length)
    found["clipped"] = first_step(ranks, folder / "clipped", max_grad_norm=0.5, **options)
    found["free"], found["free folder"] = found[name], folder / name
    random = {"estimator": EstimatorSection("masked", 0.5), "ratio": RatioSection(0.2, 0.6)}
    random |= {"eval_every": 2, "histogram_every": 2}
    found["whole"] = run(ranks, folder / "whole", max_steps=6, save_every=3, **random)
    middle = folder / "whole" / "checkpoints" / "checkpoint-3"
    found["resumed"] = run(ranks, folder / "resumed", max_steps=6, resume=str(middle), **random)
    if ranks.is_first:
        (folder / "parts" / ".best.cut.partial" / "best").mkdir(parents=True)
    found["stopped"] = run(ranks, folder / "parts", max_steps=6, stop_at=2, **random)
    found["continued"] = run(ranks, folder / "parts", max_steps=6, **random)
    for stage in (1, 3):
        run(ranks, folder / f"zero{stage}", zero_stage=stage, max_steps=1, eval_every=1, max_grad_norm=1e9, **options)
    found["bfloat16"] = run(ranks, folder / "bfloat16", dtype="bfloat16", max_steps=2)
    return found


def gradient(ranks: list[dict[str, Any]], name: str) -> Tensor:
    """The whole gradient of a first step, from all ranks' shards; zeros of alignment cut off."""
    groups = [torch.cat(shards) for shards in zip(*(rank[name] for rank in ranks), strict=True)]
    return torch.cat([group[: int(group.nonzero().max()) + 1] for group in groups]) / 0.1


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[dict[str, Any]]]]:
    folders = {size: tmp_path_factory.mktemp(f"ranks{size}") for size in (1, 2)}
    return {size: (folder, run_distributed(job, folder, world_size=size)) for size, folder in folders.items()}


def test_ranks_agree(results):
    one, other = ({name: rank[name] for name in ("whole", "resumed", "continued")} for rank in results[2][1])
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_gradient_does_not_depend_on_how_clips_are_spread(results):
    reference = gradient(results[1][1], "batch of 4")
    for size, spreads in SPREADS.items():
        for name in (*spreads, *(f"{name}, grouped" for name in spreads if name in GROUPED)):
            error = gradient(results[size][1], name) - reference
            assert error.norm() < 1e-4 * reference.norm(), name


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("stage", [1, 3])
def test_log_does_not_depend_on_the_zero_stage(results, size: int, stage: int):
    reference = read_log(results[size][1][0]["free folder"])
    for record, expected in zip(read_log(results[size][0] / f"zero{stage}"), reference, strict=True):
        assert record == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_trainables_stay_in_float32_beside_a_bfloat16_llm(results, size: int):
    log = read_log(results[size][0] / "bfloat16")
    assert all(math.isfinite(record["train/loss"]) and record["grad_norm"] > 0 for record in log)
    for rank in results[size][1]:
        assert {value.dtype for value in rank["bfloat16"].values()} == {torch.float32}


def test_log_does_not_depend_on_how_clips_are_spread(results):
    logs = [read_log(results[size][0] / name) for size, spreads in SPREADS.items() for name in spreads]
    assert len(logs[0]) == 2  # one step and one validation
    for log in logs[1:]:
        for record, reference in zip(log, logs[0], strict=True):
            assert record == pytest.approx(reference, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["resumed", "continued"])
def test_resumed_is_uninterrupted(results, size: int, name: str):
    found = results[size][1][0]
    assert any(not torch.equal(found["stopped"][key], found["whole"][key]) for key in found["whole"])
    torch.testing.assert_close(found[name], found["whole"], rtol=0, atol=0)


def test_log_of_a_resumed_run_is_that_of_an_uninterrupted_one(results):
    assert read_log(results[2][0] / "parts") == read_log(results[2][0] / "whole")


def test_the_log_says_what_changed_and_how_scores_lie(results):
    log = read_log(results[2][0] / "whole")
    assert [record["step"] for record in log if "churn/video" in record] == [4, 6]
    assert [record["step"] for record in log if "score_audio/p50" in record] == [2, 4, 6]
    assert any(record.get("churn/video", 0) > 0 for record in log)
    # Resumed from between two validations.
    assert read_log(results[2][0] / "resumed") == [record for record in log if record["step"] > 3]


def test_the_log_says_where_time_and_memory_go(results):
    lines = (results[2][0] / "whole" / "metrics.jsonl").read_text().splitlines()
    names = {name for name in json.loads(lines[0]) if name.startswith(("seconds/", "memory_gib/"))}
    laps = ("step", "data_wait", "rank_wait", "encoders", "forward", "backward", "optimiser")
    assert names == {
        *(f"seconds/{lap}" for lap in laps),
        "memory_gib/process",
        "memory_gib/process_peak",
        "memory_gib/machine_free",
    }


def test_pictures_of_a_resumed_run_are_those_of_an_uninterrupted_one(results):
    drawn = {
        name: {path.name: path.read_bytes() for path in (results[2][0] / name / "images").iterdir()}
        for name in ("whole", "parts")
    }
    assert {name[5:12] for name in drawn["whole"]} == {"0000002", "0000004", "0000006"}
    assert len(drawn["whole"]) == 3 * VAL_BATCHES
    assert drawn["parts"] == drawn["whole"]


def read_log(folder: Path) -> list[dict[str, float]]:
    """Records of a run without its times and its memory."""
    return [lasting(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("size", [1, 2])
def test_clipping_is_by_the_global_norm(results, size: int):
    clipped = gradient(results[size][1], "clipped")
    free = gradient(results[size][1], "free")
    assert free.norm() > 1
    assert clipped.norm() == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-4, atol=1e-7)


def test_a_run_leaves_what_its_docs_promise(results):
    folder = results[2][0] / "whole"
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "last", "best", "images",
    }  # fmt: skip
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-6", "latest"]
    assert (folder / "checkpoints" / "latest").read_text() == "checkpoint-6\n"


def test_the_best_of_a_run_cut_short_does_not_stay(results):
    for size in (1, 2):
        assert not (results[size][0] / "parts" / ".best.cut.partial").exists()


def test_checkpoints_hold_no_frozen_parameter(results):
    path = results[2][0] / "whole" / "checkpoints" / "checkpoint-6" / "engine" / "mp_rank_00_model_states.pt"
    module = torch.load(path, weights_only=False)["module"]
    assert {name.split(".")[0] for name, value in module.items() if value.dim() > 1} == {"compressor"}


def test_learning_rate_is_logged_as_it_was_used(results):
    lines = (results[2][0] / "whole" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["lr/compressor"] for line in lines if "lr/compressor" in line]
    assert rates[0] == pytest.approx(PEAK / 2)  # the first of two warm-up steps
    assert rates[1] == pytest.approx(PEAK)
    assert rates[-1] == pytest.approx(PEAK / 10)
