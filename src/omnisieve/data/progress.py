"""How far the processes of a long run are, told through files.

Where each process works for hours on a share of its own, a collective would run into its time limit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SECONDS = 1.0


class Progress:
    """The files of one run: each process writes its own, and reads those of the others.

    Attributes:
        total: items that all processes have done, as far as this one has heard.
    """

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        """
        Args:
            folder: of this run alone; all processes see it.
            rank: of this process.
            world_size: number of processes.
        """
        self.total = 0
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._next = 0.0

    def report(self, done: int) -> None:
        """Tell how many items this process has done, and hear from the others; at most once a second."""
        if time.monotonic() >= self._next:
            self._write({"done": done})
            self._read()
            self._next = time.monotonic() + _SECONDS

    def finish(self, done: int, result: Mapping[str, Any]) -> None:
        """Tell what this process ended with; JSON values."""
        self._write({"done": done, "result": dict(result)})

    def results(self) -> list[dict[str, Any]] | None:
        """What each process ended with, by rank; None while one has not."""
        ended = [entry["result"] for entry in self._read() if "result" in entry]
        return ended if len(ended) == self._world_size else None

    def _write(self, entry: Mapping[str, Any]) -> None:
        path = self._folder / f"{self._rank}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(entry), encoding="utf-8")
        temporary.replace(path)

    def _read(self) -> list[dict[str, Any]]:
        paths = (self._folder / f"{rank}.json" for rank in range(self._world_size))
        told = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
        self.total = sum(entry["done"] for entry in told)
        return told
