"""Scalars of a run, as TensorBoard events and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from omnisieve.training.errors import writing

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"


class Tracker:
    """Writes scalars of the first rank; on the others it does nothing."""

    def __init__(self, directory: Path, *, first_step: int = 0, enabled: bool = True) -> None:
        """Open the log of a run.

        Args:
            directory: the run's folder.
            first_step: steps done so far; what an interrupted run logged beyond it is dropped.
            enabled: False on every rank but the first.
        """
        self._file = self._events = None
        if not enabled:
            return
        path = directory / METRICS_FILE
        _drop_after(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(directory / EVENTS_FOLDER), purge_step=first_step + 1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record `scalars` after `step` optimiser steps."""
        self.note(step, **scalars)
        if self._events is not None:
            with writing("the log", Path(self._events.log_dir)):
                for name, value in scalars.items():
                    self._events.add_scalar(name, value, step)

    def note(self, step: int, **facts: Any) -> None:
        """Record JSON values that are no scalars, as a line of the file only."""
        if self._file is not None:
            with writing("the log", Path(self._file.name)):
                self._file.write(json.dumps({"step": step, **facts}) + "\n")
                self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None and self._events is not None:
            self._file.close()
            self._events.close()


def _drop_after(path: Path, step: int) -> None:
    """Remove records beyond `step`, and a line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    path.write_text("".join(kept), encoding="utf-8")
