"""Two ranks and bad days: a step that is not finite, and a signal to one of them. The run goes on as it was to be."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omnisieve.config import LlmSection
from omnisieve.data.sampler import StreamSampler
from omnisieve.training import Trainer, TrainingError
from omnisieve.training.distributed import Ranks
from omnisieve.training.guards import GRADIENT, LOSS, SKIPPED
from tests.distributed.launch import run_distributed
from tests.training.batches import CLIPS
from tests.training.clips import lasting
from tests.training.runs import compressor_of, make_config, make_trainer

STEPS, BAD, MICRO = 3, 2, 2  # the second step is bad, by its second micro-batch
Injection = Callable[[Trainer, Callable[[], bool]], None]


def nan_loss(trainer: Trainer, due: Callable[[], bool]) -> None:
    """A loss that is not a number, and so are all gradients."""
    _change_loss(trainer, lambda loss: loss * float("nan") if due() else loss)


def infinite_loss(trainer: Trainer, due: Callable[[], bool]) -> None:
    """An infinite loss whose gradients are finite."""
    _change_loss(trainer, lambda loss: loss + float("inf") if due() else loss)


def nan_gradient(trainer: Trainer, due: Callable[[], bool]) -> None:
    """One element of one gradient."""
    _change_gradient(trainer, lambda gradient: gradient.index_fill(0, torch.tensor([0]), float("nan")), due)


def huge_gradient(trainer: Trainer, due: Callable[[], bool]) -> None:
    """A finite gradient with a norm beyond float32."""
    _change_gradient(trainer, lambda gradient: gradient.new_full(gradient.shape, 1e30), due)


def skipped(trainer: Trainer, due: Callable[[], bool]) -> None:
    """A step that DeepSpeed leaves out by itself, on all ranks."""
    optimizer = trainer.engine.optimizer
    norm = optimizer.scaled_global_norm
    optimizer.scaled_global_norm = lambda *_, **__: norm() * (float("inf") if trainer.step + 1 == BAD else 1)


def _change_loss(trainer: Trainer, change: Callable[[Tensor], Tensor]) -> None:
    def hook(_: Any, __: Any, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return outputs | {"loss": change(outputs["loss"])}

    trainer.module.register_forward_hook(hook)


def _change_gradient(trainer: Trainer, change: Callable[[Tensor], Tensor], due: Callable[[], bool]) -> None:
    parameter = next(trainer.module.compressor.parameters())
    parameter.register_hook(lambda gradient: change(gradient) if due() else gradient)


def state_of(trainer: Trainer) -> list[Tensor]:
    """Everything that training changes: parameters, this rank's masters and its optimiser state."""
    zero = trainer.engine.optimizer
    accumulators = [value for state in zero.optimizer.state.values() for value in state.values()]
    learning = [parameter for parameter in trainer.module.parameters() if parameter.requires_grad]
    if trainer.engine.zero_optimization_stage() == 3:
        own = [*(part.ds_tensor for part in learning), *zero.fp32_partitioned_groups_flat, *accumulators]
    else:
        own = [*learning, *zero.single_partition_of_fp32_groups, *accumulators]
    return [torch.as_tensor(value).detach().clone() for value in own]


def unchanged_steps(trainer: Trainer) -> list[int]:
    """Filled while training: the steps, from 1, before and after which every byte is the same."""
    found: list[int] = []
    step = trainer.engine.step

    def compare() -> None:
        takes_step = trainer.engine.is_gradient_accumulation_boundary()
        before = state_of(trainer)
        step()
        after = state_of(trainer)
        if takes_step and len(before) == len(after) and all(map(torch.equal, before, after)):
            found.append(trainer.step + 1)

    trainer.engine.step = compare
    return found


def run(
    ranks: Ranks, folder: Path, inject: Injection | None = None, *, bad: tuple[int, ...] = (BAD,), **train: Any
) -> dict[str, Any]:
    """Train with an injection on the last rank, and say what became of it."""
    options = {"max_steps": STEPS, "gradient_accumulation_steps": MICRO, "save_every": BAD, **train}
    trainer = make_trainer(make_config(folder, **options), ranks)

    def due() -> bool:
        last = trainer.engine.is_gradient_accumulation_boundary()
        return ranks.rank == ranks.world_size - 1 and trainer.step + 1 in bad and last

    if inject is not None:
        inject(trainer, due)
    unchanged = unchanged_steps(trainer)
    error = None
    try:
        trainer.fit()
    except TrainingError as raised:
        error = str(raised)
    done = {"unchanged": unchanged, "error": error, "step": trainer.step, "folder": folder}
    return {**done, "parameters": compressor_of(trainer)}


def asked_in_a_step(trainer: Trainer, due: Callable[[], bool]) -> None:
    """SIGTERM to this process while it trains."""
    trainer.module.register_forward_pre_hook(lambda *_: terminate() if due() else None)


def asked_in_a_validation(trainer: Trainer, due: Callable[[], bool]) -> None:
    """SIGTERM to the second rank while it validates after the step."""

    def hook(module: torch.nn.Module, _: Any) -> None:
        if not module.training and trainer.step == BAD and torch.distributed.get_rank() == 1 and not asked:
            asked.append(True)
            terminate()

    asked: list[bool] = []
    trainer.module.register_forward_pre_hook(hook)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)  # to be heard before the step is done


INJECTIONS = {
    "nan loss": (nan_loss, LOSS),
    "infinite loss": (infinite_loss, LOSS),
    "nan gradient": (nan_gradient, GRADIENT),
    "huge gradient": (huge_gradient, GRADIENT),
    "skipped by DeepSpeed": (skipped, SKIPPED),
}
REQUESTS = (asked_in_a_step, asked_in_a_validation)
FROZEN, LORA, FULL, FULL_BF16 = "frozen", "lora", "full", "full in bfloat16"
CASES = [
    *((name, 2, FROZEN) for name in INJECTIONS),
    ("nan loss", 1, FROZEN),
    ("nan gradient", 1, FROZEN),
    ("nan gradient", 3, FROZEN),
    ("nan gradient", 2, LORA),
    ("nan loss", 3, LORA),
    ("nan loss", 2, FULL),
    ("huge gradient", 3, FULL),
    ("infinite loss", 2, FULL_BF16),
    ("nan gradient", 3, FULL_BF16),
    ("huge gradient", 2, FULL_BF16),
]
RESUMED = CASES[list(INJECTIONS).index("nan gradient")]


def job(ranks: Ranks, folder: Path) -> dict[Any, Any]:
    """All runs: starting processes costs more than the runs."""
    found: dict[Any, Any] = {"clean": run(ranks, folder / "clean")}
    for case in CASES:
        name, stage, mode = case
        options = {"dtype": "bfloat16" if mode == FULL_BF16 else "float32", "llm": LlmSection(mode.split()[0])}
        found[case] = run(ranks, folder / " ".join(map(str, case)), INJECTIONS[name][0], zero_stage=stage, **options)
    found["first"] = run(ranks, folder / "first", infinite_loss, bad=(1,), save_every=1, save_total_limit=3)
    for name, step in ((" ".join(map(str, RESUMED)), BAD), ("first", 1)):
        path = folder / name / "checkpoints" / f"checkpoint-{step}"
        found[f"{name} resumed"] = run(ranks, folder / f"{name} resumed", resume=str(path), save_every=0)
    found["hopeless"] = run(ranks, folder / "hopeless", nan_loss, bad=(2, 3), max_bad_steps=2, save_every=1)
    validated = {"eval_every": BAD, "save_every": 0}
    found["whole"] = run(ranks, folder / "whole", **validated)
    for inject in REQUESTS:
        name = inject.__name__
        found[name] = run(ranks, folder / name, inject, **validated)
        found[name]["latest"] = (folder / name / "checkpoints" / "latest").read_text()
        found[f"{name}, resumed"] = run(ranks, folder / name, **validated)
    found["mended"] = run(ranks, folder / "mended", nan_loss, bad=(1, 3), max_bad_steps=2)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_distributed(job, tmp_path_factory.mktemp("guards"))


def read_log(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result["folder"] / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_byte_changes_in_a_bad_step(results, case: tuple[str, int, str]):
    for rank in results:
        assert rank["clean"]["unchanged"] == []
        assert rank[case]["unchanged"] == [BAD]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_samples_are_named(results, case: tuple[str, int, str]):
    result = results[0][case]
    (record,) = (record for record in read_log(result) if "left_out" in record)
    assert record["step"] == BAD
    # Positions 4 to 7 of the stream: rank 0 takes the first of each micro-batch. Of what
    # DeepSpeed skips nobody knows whose it was.
    samples = [f"clip {clip}" for clip in clips_of(result["folder"])[4:8]]
    what = INJECTIONS[case[0]][1]
    expected = [(what, 0, [samples[0]]), (what, 0, [samples[2]]), (what, 1, [samples[1]]), (what, 1, [samples[3]])]
    found = [(fault["what"], fault["rank"], fault["samples"]) for fault in record["left_out"]]
    assert found == (expected if what == SKIPPED else expected[-1:])


def clips_of(folder: Path) -> list[int]:
    """The first epoch's order."""
    sampler = StreamSampler(len(CLIPS), 1, seed=make_config(folder).train.seed)
    return [sampler.sample(position) for position in range(len(CLIPS))]


def test_the_schedule_goes_on(results):
    def rates(result: dict[str, Any]) -> list[float]:
        return [record["lr/compressor"] for record in read_log(result) if "lr/compressor" in record]

    for case in CASES:
        assert rates(results[0][case]) == rates(results[0]["clean"])


def test_a_resumed_run_is_the_uninterrupted_one(results):
    for rank in results:
        for whole, resumed in ((RESUMED, "nan gradient 2 frozen resumed"), ("first", "first resumed")):
            expected, found = rank[whole]["parameters"], rank[resumed]["parameters"]
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert read_log(results[0]["nan gradient 2 frozen resumed"])[-1]["bad_steps"] == 1


def test_steps_in_a_row_end_the_run(results):
    for rank in results:
        error = rank["hopeless"]["error"]
        assert "2 steps in a row" in error
        assert "loss not finite on rank 1, samples clip" in error
        assert rank["hopeless"]["unchanged"] == [2, 3]
        assert rank["mended"]["error"] is None
    latest = results[0]["hopeless"]["folder"] / "checkpoints" / "latest"
    assert latest.read_text() == "checkpoint-2\n"


@pytest.mark.parametrize("name", [request.__name__ for request in REQUESTS])
def test_a_signal_to_one_rank_ends_all_after_their_step_and_nothing_is_lost(results, name: str):
    for rank in results:
        assert rank[name]["step"] == BAD
        assert rank[name]["latest"] == f"checkpoint-{BAD}\n"
        torch.testing.assert_close(rank[f"{name}, resumed"]["parameters"], rank["whole"]["parameters"], rtol=0, atol=0)
    assert without_times(results[0][f"{name}, resumed"]) == without_times(results[0]["whole"])
    best = [best_loss(results[0][run]) for run in (f"{name}, resumed", "whole")]
    assert best[0] == best[1]


def without_times(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [lasting(record) for record in read_log(result)]


def best_loss(result: dict[str, Any]) -> float:
    path = result["folder"] / "checkpoints" / f"checkpoint-{STEPS}" / "state.json"
    return json.loads(path.read_text())["best_loss"]


def test_a_bad_step_is_not_measured(results):
    for record in read_log(results[0]["mended"]):
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float)), record
