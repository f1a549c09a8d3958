"""Ranks: the environment they need, the counts they share, and an exit that always succeeds."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from omnisieve.training.errors import TrainingError


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Attributes:
        rank, world_size: of all processes.
        device: where this one computes.
        host_group: process group for values on the host, which never waits for a device.
    """

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum host values over the ranks, element by element."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """What each rank brings, by rank; for small values that pickle, on rare occasions."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def tell(self, text: str) -> None:
        """Say, once for all ranks, what is being done."""
        if self.is_first:
            print(text, file=sys.stderr, flush=True)

    def barrier(self) -> None:
        """Wait for all ranks, on the host."""
        dist.barrier(group=self.host_group)


def connect() -> Ranks:
    """Join the process group that the launcher describes; without a launcher, be the only rank.

    Raises:
        TrainingError: there are fewer accelerators than processes; or, on a CPU, what DeepSpeed compiles at its first
            start cannot be compiled.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    complete_environment()
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() == "cpu":
        check_compiler()
        if local_rank == 0:
            announce_compilation()
        divide_threads()
    else:
        if local_rank >= accelerator.device_count():
            raise TrainingError(
                f"process {local_rank} of this machine has no accelerator, there are {accelerator.device_count()}: "
                "start as many processes as there are accelerators (deepspeed --num_gpus N)"
            )
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=torch.device(accelerator.current_device_name()),
        host_group=dist.new_group(backend="gloo"),
    )


def check_compiler() -> None:
    """Refuse early what would kill all ranks in DeepSpeed's first compilation.

    Raises:
        TrainingError: no C++ compiler or no Python headers.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise TrainingError(f"DeepSpeed compiles a small operator on CPUs, but there is no {compiler}: install g++")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise TrainingError(
            f"DeepSpeed compiles a small operator on CPUs, but {header} is missing: install Python's headers "
            f"(python3-dev on Debian)"
        )


def announce_compilation() -> None:
    """Say what the start waits for when DeepSpeed's operator for CPUs is not compiled yet, or never will be.

    Who compiles it holds a lock, a file that stays when the process is killed. Later starts then wait for it without
    a word and without end.
    """
    folder = operator_folder()
    lock = folder / "lock"
    try:
        is_old = lock.stat().st_mtime < _start_of_process()
    except FileNotFoundError:
        is_old = False
    if is_old:
        print(
            f"waiting for {lock}: another start is compiling DeepSpeed's operator, or was killed while it did. If no "
            f"other start is running, remove the file: rm {lock}",
            file=sys.stderr,
            flush=True,
        )
    elif not any(folder.glob("*.so")):
        print("compiling DeepSpeed's operator for CPUs once, about 30 s", file=sys.stderr, flush=True)


def operator_folder() -> Path:
    """Where DeepSpeed compiles its operator for CPUs; made if it is not there."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(ShareMemCommBuilder.NAME, verbose=False))


def _start_of_process() -> float:
    """When this process started, in seconds since the epoch; a peer's lock is younger."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def leave(code: int = 0) -> NoReturn:
    """End the process now, with this exit status.

    Library threads abort now and then while the interpreter takes itself down, long after the work is done; so
    the interpreter does not get to it. With code 0 all ranks wait for each other first.
    """
    if code == 0 and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def divide_threads() -> None:
    """Leave each process of this machine its share of the cores; each would otherwise start a thread for every one."""
    torch.set_num_threads(max(len(os.sched_getaffinity(0)) // _local_world_size(), 1))


def complete_environment() -> None:
    """Without a launcher, say what it would say of a single process."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in alone.items()})


def _local_world_size() -> int:
    """Ranks on this machine: torchrun and deepspeed name them differently."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
