"""SIGKILL, twenty times over one run that saves every step: each life goes on from a complete checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from omnisieve.config import EstimatorSection, RatioSection
from omnisieve.training.checkpoint import FOLDER, LATEST_FILE, CheckpointStore, verify
from omnisieve.training.distributed import connect, leave
from tests.distributed.programs import free_port, largest_difference, lasting_log
from tests.training.runs import Alone, make_config, make_trainer

LIVES, STEPS, RANKS = 20, 48, 2


def live(rank: int, port: str, output_dir: Path) -> None:
    """One life of one rank."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_PORT": port})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    ranks = connect()
    torch.set_num_threads(1)
    random_steps = {"estimator": EstimatorSection("masked", 0.5), "ratio": RatioSection(0.2, 0.6)}
    config = make_config(output_dir, max_steps=STEPS, save_every=1, eval_every=7, **random_steps)
    make_trainer(config, ranks).fit()
    leave(0)


def start(output_dir: Path) -> list[BaseProcess]:
    """Both ranks, forked from a process that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch.utils.cpp_extension", "deepspeed.module_inject"])
    port = free_port()
    ranks = [context.Process(target=live, args=(rank, port, output_dir)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    return ranks


def end(output_dir: Path) -> None:
    """A life without a kill."""
    for process in start(output_dir):
        process.join(timeout=300)
        assert process.exitcode == 0


def latest(output_dir: Path) -> int:
    """Step of the checkpoint that a life would go on from, when it is whole; 0 without one."""
    path = CheckpointStore(output_dir, Alone(), identity={}).find("auto")
    if path is None:
        return 0
    verify(path)
    return int(path.name.rpartition("-")[2])


def wait(ranks: list[BaseProcess], condition: Callable[[], bool], seconds: float = 300) -> float:
    """Until something is so, or so long; returns the time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        assert all(process.exitcode is None for process in ranks)
        time.sleep(0.001)
    return time.monotonic()


def published(output_dir: Path) -> Callable[[], bool]:
    """Whether there is a newer checkpoint than now."""
    latest = output_dir / FOLDER / LATEST_FILE

    def name() -> str:
        return latest.read_text() if latest.exists() else ""

    before = name()
    return lambda: name() != before


def saving(output_dir: Path) -> bool:
    return any((output_dir / FOLDER).glob(".*"))


@pytest.mark.slow
def test_20_of_20_lives_go_on_from_a_complete_checkpoint(tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begin = time.monotonic()
    ranks = start(whole)
    first = wait(ranks, published(whole))
    wait(ranks, lambda: not saving(whole))
    save = -wait(ranks, lambda: saving(whole)) + wait(ranks, published(whole))
    for process in ranks:
        process.join()
    step = (time.monotonic() - first) / STEPS

    draw = random.Random(0)
    steps, in_a_save = [0], 0
    for life in range(LIVES):
        ranks = start(killed)
        if life % 4 == 0:  # while it starts
            wait(ranks, published(killed), draw.uniform(0, first - begin))
        elif life % 4 == 1:  # somewhere between two saves, or in the second
            wait(ranks, published(killed))
            time.sleep(draw.uniform(0, step))
        else:  # in a save
            wait(ranks, lambda: not saving(killed))
            wait(ranks, lambda: saving(killed))
            time.sleep(draw.uniform(0, save))
        draw.shuffle(ranks)
        for process in ranks:
            process.kill()
            time.sleep(draw.uniform(0, 0.1))  # a launcher ends the others when one is gone
        for process in ranks:
            process.join()
        in_a_save += saving(killed)
        steps.append(latest(killed))
    assert steps == sorted(steps)
    assert LIVES / 4 < steps[-1] < STEPS
    assert in_a_save >= LIVES / 10
    end(killed)
    assert largest_difference(whole, killed) == 0
    assert lasting_log(killed) == lasting_log(whole)
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}
