"""SIGTERM and SIGINT to ranks, to launchers and to everything at once: the run ends well and goes on as if uncut."""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.distributed.programs import (
    ENDLESS,
    arguments,
    family,
    finish,
    free_port,
    largest_difference,
    last_checkpoint,
    last_logged,
    lasting_log,
    start,
    start_two_ranks,
    two_ranks,
    wait_for_step,
)

STEPS = 60
RESUMED = (
    f"train.max_steps={STEPS}",
    "train.log_every=1",
    "train.eval_every=0",
    "train.save_every=0",
    "data.workers=1",
)
WORLD = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
LAUNCHERS = {
    "deepspeed": ("deepspeed.launcher.runner", "--num_gpus", "2"),
    "its launcher": ("deepspeed.launcher.launch", f"--world_info={WORLD}", "--master_addr=127.0.0.1"),
    "torchrun": ("torch.distributed.run", "--nproc_per_node", "2"),
}
Send = Callable[[psutil.Process, signal.Signals], None]


def to_itself(launcher: psutil.Process, number: signal.Signals) -> None:
    launcher.send_signal(number)


def to_its_group(launcher: psutil.Process, number: signal.Signals) -> None:
    """As a terminal does."""
    os.killpg(launcher.pid, number)


def to_all_processes(launcher: psutil.Process, number: signal.Signals) -> None:
    """As a cluster's scheduler does."""
    for process in (launcher, *launcher.children(recursive=True)):
        process.send_signal(number)


def test_sigterm_to_one_of_two_ranks_ends_both_well(clips: Path, tmp_path: Path):
    ranks = start_two_ranks(*arguments(clips, tmp_path / "run", *ENDLESS))
    wait_for_step(tmp_path / "run", 1, *ranks)
    ranks[1].send_signal(signal.SIGTERM)
    for status, output in map(finish, ranks):
        assert status == 0, output
    assert last_checkpoint(tmp_path / "run") == last_logged(tmp_path / "run") < 1000


@pytest.mark.slow
def test_signals_to_one_rank_after_another_lose_nothing(clips: Path, tmp_path: Path):
    """Each run goes on from where a signal ended the one before; together they are the run without signals."""
    whole, parts = (arguments(clips, tmp_path / name, *RESUMED) for name in ("whole", "parts"))
    for status, output in two_ranks(*whole):
        assert status == 0, output
    done = 0
    for rank, number in ((0, signal.SIGINT), (1, signal.SIGTERM), (0, signal.SIGTERM)):
        ranks = start_two_ranks(*parts)
        wait_for_step(tmp_path / "parts", done + 1, *ranks)
        ranks[rank].send_signal(number)
        for status, output in map(finish, ranks):
            assert status == 0, output
        assert done < last_checkpoint(tmp_path / "parts") < STEPS
        done = last_checkpoint(tmp_path / "parts")
    for status, output in two_ranks(*parts):
        assert status == 0, output
    assert largest_difference(tmp_path / "whole", tmp_path / "parts") == 0
    assert lasting_log(tmp_path / "parts") == lasting_log(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "send", "number"),
    [
        ("deepspeed", to_itself, signal.SIGTERM),
        ("deepspeed", to_itself, signal.SIGINT),
        ("deepspeed", to_its_group, signal.SIGTERM),
        ("deepspeed", to_its_group, signal.SIGINT),
        ("its launcher", to_itself, signal.SIGTERM),
        ("its launcher", to_itself, signal.SIGINT),
        ("torchrun", to_itself, signal.SIGTERM),
        ("torchrun", to_itself, signal.SIGINT),
        ("torchrun", to_all_processes, signal.SIGTERM),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_signal_to_the_launcher_leaves_a_checkpoint(
    clips: Path, tmp_path: Path, launcher: str, send: Send, number: signal.Signals
):
    """It may reach the ranks' decoding workers, too, whose samples the last step needs."""
    words = arguments(clips, tmp_path / "run", *ENDLESS, "data.workers=1")
    port = f"--master_port={free_port()}"
    process = start([sys.executable, "-m", *LAUNCHERS[launcher], port, "train.py", *words])
    wait_for_step(tmp_path / "run", 1, process)
    processes = family(process)
    send(processes[0], number)
    _, output = finish(process)
    assert "ended on request" in output, output
    assert last_checkpoint(tmp_path / "run") == last_logged(tmp_path / "run") < 1000
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()
    assert not psutil.wait_procs(processes, timeout=30)[1]
    if (launcher, send) == ("deepspeed", to_itself):
        assert "the launcher is gone" in output
        assert output.count("exits successfully") == 2
