"""`train.py` in processes of its own, as users and launchers start it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from omnisieve.training.checkpoint import verify
from tests.training.clips import lasting

ROOT = Path(__file__).parents[2]
# Overrides of a run that only a signal ends.
ENDLESS = ("train.max_steps=1000", "train.log_every=1", "train.eval_every=0", "train.save_every=0")


def arguments(clips: Path, output_dir: Path, *overrides: str) -> list[str]:
    """Of a run of two steps that decodes and encodes its clips."""
    settings = {
        "data.train": clips / "train.jsonl",
        "data.val": clips / "val.jsonl",
        "data.feature_cache": "null",
        "data.workers": 0,
        "train.max_steps": 2,
        "train.micro_batch_size": 1,
        "output_dir": output_dir,
    }
    return ["--config", "recipes/quickstart.yaml", *(f"{k}={v}" for k, v in settings.items()), *overrides]


def start(command: Sequence[str], *, core: int | None = None, **environment: str) -> subprocess.Popen[str]:
    """A program of the repository, in a process group of its own; with `core` it sees one core only."""
    places = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in places}
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    variables = {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    cores = sorted(os.sched_getaffinity(0))

    def prepare() -> None:
        # A shell lets what it runs in the background ignore SIGINT, and that would be inherited.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if core is not None:
            os.sched_setaffinity(0, {cores[core % len(cores)]})

    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=prepare,
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str]:
    """Exit status and output, when nobody writes any more; of the process group nothing outlives the test."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, output


def train(*words: str) -> tuple[int, str]:
    return finish(start([sys.executable, "train.py", *words]))


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_two_ranks(*words: str, core_each: bool = False) -> list[subprocess.Popen[str]]:
    """Both ranks without a launcher in between, so that each one's exit status is seen."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "train.py", *words]
    return [
        start(command, core=rank if core_each else None, RANK=str(rank), LOCAL_RANK=str(rank), **address)
        for rank in range(2)
    ]


def two_ranks(*words: str) -> list[tuple[int, str]]:
    return [finish(rank) for rank in start_two_ranks(*words)]


def wait_for_step(output_dir: Path, step: int, *processes: subprocess.Popen[str], timeout: float = 300) -> None:
    """Until so many steps are logged."""
    end = time.monotonic() + timeout
    while last_logged(output_dir) < step:
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < end
        time.sleep(0.1)


def last_logged(output_dir: Path) -> int:
    """The last step in the log; 0 without one."""
    log = output_dir / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def last_checkpoint(output_dir: Path) -> int:
    """Its step, when it is whole."""
    name = (output_dir / "checkpoints" / "latest").read_text().strip()
    verify(output_dir / "checkpoints" / name)
    return int(name.removeprefix("checkpoint-"))


def assert_complete(output_dir: Path, steps: int) -> None:
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == steps
    assert "val/loss" in records[-1]
    for name in ("last", "best"):
        assert load_file(output_dir / name / "compressor.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    """Between any two parameters of the compressors that two runs ended with."""
    first, second = (load_file(folder / "last" / "compressor.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def lasting_log(output_dir: Path) -> list[dict[str, Any]]:
    """The log without what another run may do otherwise."""
    return [lasting(json.loads(line)) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """A process and all below it."""
    top = psutil.Process(process.pid)
    return [top, *top.children(recursive=True)]
