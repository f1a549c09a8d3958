"""Run a function on several ranks of this machine."""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from omnisieve.training.distributed import Ranks, connect, leave


def run_distributed(function: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
    """Call `function(ranks, *args)` in fresh processes that form a gloo group.

    Args:
        function: importable by name.
        args: for it; must pickle.
        world_size: how many processes.

    Returns:
        what each rank returned, by rank. A rank that fails makes the call fail.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world_size, port, folder, function, args), nprocs=world_size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        ranks: Ranks = connect()
        torch.set_num_threads(1)
        torch.save(function(ranks, *args), Path(folder) / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)
