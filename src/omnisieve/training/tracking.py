"""The log of a run: scalars as TensorBoard events and as JSON lines, histograms and pictures beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from omnisieve.files import publish
from omnisieve.training.errors import writing
from omnisieve.training.scores import EDGES, Distribution

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"
IMAGES_FOLDER = "images"
# File names stay readable, and short enough for every file system.
_LONGEST_NAME = 80


class Tracker:
    """Writes the log of the first rank; on the others it does nothing."""

    def __init__(self, directory: Path, *, first_step: int = 0, enabled: bool = True, picture_limit: int = 20) -> None:
        """Open the log of a run.

        Args:
            directory: the run's folder.
            first_step: steps done so far; what an interrupted run logged beyond it is dropped.
            enabled: False on every rank but the first.
            picture_limit: newest steps whose pictures stay as files.
        """
        self._file = self._events = None
        if not enabled:
            return
        self._images = directory / IMAGES_FOLDER
        self._picture_limit = picture_limit
        path = directory / METRICS_FILE
        with writing("the log", directory):
            _drop_after(path, first_step)
            for step, pictures in self._pictures().items():
                if step > first_step:
                    _remove(pictures)
            self._file = path.open("a", encoding="utf-8")
            self._events = SummaryWriter(str(directory / EVENTS_FOLDER), purge_step=first_step + 1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record `scalars` after `step` optimiser steps."""
        self.note(step, **scalars)
        if self._events is not None:
            with writing("the log", Path(self._events.log_dir)):
                for name, value in scalars.items():
                    self._events.add_scalar(name, value, step)

    def histograms(self, step: int, found: Mapping[str, Distribution]) -> None:
        """Record distributions by name, as events only."""
        if self._events is None:
            return
        with writing("the log", Path(self._events.log_dir)):
            for name, values in found.items():
                used = np.flatnonzero(values.counts)
                first, last = used[0], used[-1]
                self._events.add_histogram_raw(
                    name,
                    min=EDGES[first],
                    max=EDGES[last + 1],
                    num=int(values.counts.sum()),
                    sum=values.total,
                    sum_squares=values.squares,
                    bucket_limits=EDGES[first + 1 : last + 2].tolist(),
                    bucket_counts=values.counts[first : last + 1].tolist(),
                    global_step=step,
                )

    def pictures(self, step: int, drawn: Mapping[str, np.ndarray]) -> None:
        """Record RGB arrays [H, W, 3] by name, as events and as files; files of older steps make room."""
        if self._events is None or not drawn:
            return
        with writing("pictures", self._images):
            self._images.mkdir(exist_ok=True)
            for name, rgb in drawn.items():
                self._events.add_image(f"clips/{name}", rgb, step, dataformats="HWC")
                short = re.sub(r"[^\w.-]+", "_", name)[:_LONGEST_NAME]
                Image.fromarray(rgb).save(self._images / f"step-{step:07d}-{short}.png")
            held = self._pictures()
            for old in sorted(held)[: max(len(held) - self._picture_limit, 0)]:
                _remove(held[old])

    def _pictures(self) -> dict[int, list[Path]]:
        """Files of pictures, by step."""
        held: dict[int, list[Path]] = {}
        for path in self._images.glob("step-*.png"):
            held.setdefault(int(path.name.split("-")[1]), []).append(path)
        return held

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


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink()


def _drop_after(path: Path, step: int) -> None:
    """Remove records beyond `step`, and a line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    shorter = path.with_name(f".{path.name}")
    shorter.write_text("".join(kept), encoding="utf-8")
    publish(shorter, path)
