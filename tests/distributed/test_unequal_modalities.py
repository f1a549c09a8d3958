"""Two ranks whose clips hold different media: neither waits for a module that the other does not call."""

from __future__ import annotations

import faulthandler
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from omnisieve.config import LlmSection, LoraSection, WarmStartSection
from omnisieve.data.batch import Batch
from omnisieve.data.sampler import StreamSampler
from omnisieve.training import engine
from omnisieve.training.distributed import Ranks
from omnisieve.training.lockstep import Lockstep
from omnisieve.training.streams import Streams
from omnisieve.training.trainer import Trainer
from tests.distributed.launch import run_distributed
from tests.distributed.test_training import read_log
from tests.models import PICTURE, QWEN2_5, QWEN3, SILENT, SOUNDING, SPEECH, Media
from tests.training.batches import make_batch
from tests.training.runs import compressor_of, make_config, make_module

pytestmark = pytest.mark.slow

STEPS, LIMIT = 20, 120.0
LONGEST_VECTOR = 64
# What each rank is given, over and over; in each of the steps the pair is another one.
SHARES: Sequence[Sequence[Sequence[Sequence[Media]]]] = (
    ([[], [SILENT]], [[]], [[SILENT]], [[], []], [[Media(grids=6)], [SILENT]]),
    ([[SPEECH], [SOUNDING]], [[PICTURE], [SPEECH]], [[SOUNDING]], [[SPEECH]], [[PICTURE, SOUNDING]], [[]], [[PICTURE]]),
)
MODES = {
    "frozen": LlmSection(),
    "lora": LlmSection(mode="lora", lora=LoraSection(rank=2, targets=["q_proj", "v_proj", "o_proj"])),
}
RUNS = [(QWEN2_5, mode, stage) for mode in MODES for stage in (1, 2, 3)] + [(QWEN3, "lora", 3)]
ALONE = 2  # the stage of a rank without peers
# Whatever else calls encoders or layers; the base asks for statistics of both encoders.
EVERYTHING: dict[str, Any] = {
    "llm": MODES["lora"],
    "base": "omnizip",
    "gradient_checkpointing": True,
    "gradient_accumulation_steps": 2,
    "distill_weight": 0.5,
    "init_from": "fastv_om",
    "warm_start": WarmStartSection(steps=3),
    "max_steps": 6,
    "eval_every": 2,
}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """A rank that takes longer writes its stacks and fails, whatever it waits for."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def matrices_spread() -> Iterator[None]:
    """DeepSpeed leaves parameters of up to 100,000 values whole once it has gathered them: all of a tiny model's.

    Here it does so with vectors alone, which are as many as matrices.
    """
    stock = engine.deepspeed_config

    def config(*args: Any) -> dict[str, Any]:
        settings = stock(*args)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = LONGEST_VECTOR
        return settings

    with patch.object(engine, "deepspeed_config", config):
        yield


class Shares:
    """Batches with pixels and spectrograms; a rank that is alone has what two would have."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._model = model
        self._own = SHARES if ranks.world_size == 1 else SHARES[ranks.rank : ranks.rank + 1]

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, itertools.count())

    def batch(self, number: int) -> Batch:
        clips = [clip for share in self._own for clip in share[number % len(share)]]
        return replace(make_batch(self._model, clips), ids=tuple(f"{number}.{place}" for place in range(len(clips))))


@dataclass
class Run:
    """The gradient of every trainable, averaged over ranks, in some steps; the compressor, empty under ZeRO-3."""

    gradients: list[dict[str, Tensor]]
    compressor: dict[str, Tensor]


def train(
    ranks: Ranks, folder: Path, family: str, *, base: str | None = None, dummies: bool = False, **options: Any
) -> Run:
    """Train within the limit.

    Args:
        ranks: this process among its peers.
        folder: of the run.
        family: of the LLM.
        base: of the compressor.
        dummies: also where no rank waits for another within a forward.
        **options: of the section `train`.
    """
    options = {"max_steps": STEPS, "eval_every": 10, "lr": 1e-3, "max_grad_norm": 1e9, "watchdog_seconds": 0} | options
    config = make_config(folder, **options)
    config.compressor["base"] = base
    with limited(LIMIT), matrices_spread():
        model, module = make_module(config, ranks, family)
        shares = Shares(model, ranks)
        sampler = StreamSampler(8, 1, seed=0, rank=ranks.rank, world_size=ranks.world_size)
        val = [(shares.batch(number), True) for number in range(3)]
        trainer = Trainer(config, module, Streams(shares, sampler, val), ranks)
        if dummies:
            trainer._lockstep = Lockstep(ranks, zero_stage=3)
        gradients = record_gradients(trainer)
        trainer.fit()
        return Run(gradients, compressor_of(trainer))


def record_gradients(trainer: Trainer) -> list[dict[str, Tensor]]:
    """A list to which every sixth optimiser step adds what it finds, the first to begin with."""
    found: list[dict[str, Tensor]] = []
    trainables = {name: p for name, p in trainer.module.named_parameters() if p.requires_grad}
    step = trainer.engine.step

    def recording() -> None:
        if trainer.engine.is_gradient_accumulation_boundary() and trainer.step % 6 == 0:
            found.append({name: safe_get_full_grad(p).clone() for name, p in trainables.items()})
        step()

    trainer.engine.step = recording
    return found


def job(ranks: Ranks, folder: Path) -> dict[str, Run]:
    """All runs of one number of ranks."""
    found = {}
    for family, mode, stage in RUNS:
        stage = stage if ranks.world_size == 2 else ALONE
        name = f"{family}-{mode}-{stage}"
        if name not in found:
            found[name] = train(ranks, folder / name, family, llm=MODES[mode], zero_stage=stage)
    for name, dummies in {"without dummies": False, "with dummies": True}.items():
        found[name] = train(ranks, folder / name, QWEN2_5, dummies=dummies, zero_stage=2, max_steps=6)
    stage = 3 if ranks.world_size == 2 else ALONE
    found["everything"] = train(ranks, folder / "everything", QWEN3, zero_stage=stage, **EVERYTHING)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[dict[str, Run]]]]:
    folders = {size: tmp_path_factory.mktemp(f"ranks{size}") for size in (1, 2)}
    return {size: (folder, run_distributed(job, folder, world_size=size)) for size, folder in folders.items()}


def assert_same_run(results: dict, name: str, reference: str) -> None:
    """Gradients and record of two ranks are those of one that has the clips of both."""
    (one_folder, (one,)), (two_folder, two) = results[1], results[2]
    for rank in two:
        for found, expected in zip(rank[name].gradients, one[reference].gradients, strict=True):
            assert found.keys() == expected.keys()
            whole, wanted = (torch.cat([values[key].flatten() for key in expected]) for values in (found, expected))
            assert (whole - wanted).norm() <= 1e-4 * wanted.norm()
    for record, expected in zip(read_log(two_folder / name), read_log(one_folder / reference), strict=True):
        assert record == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("family", "mode", "stage"), RUNS)
def test_two_ranks_of_different_media_are_one_with_all_of_them(results, family: str, mode: str, stage: int):
    assert_same_run(results, f"{family}-{mode}-{stage}", f"{family}-{mode}-{ALONE}")


def test_so_they_are_in_whatever_else_calls_the_model(results):
    assert_same_run(results, "everything", "everything")


def test_dummies_change_no_number(results):
    for rank in results[2][1]:
        found, expected = rank["with dummies"], rank["without dummies"]
        torch.testing.assert_close(found.compressor, expected.compressor, rtol=0, atol=0)
        torch.testing.assert_close(found.gradients, expected.gradients, rtol=0, atol=0)
