"""The record of samples that could not be used, or not as they were asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Generic, TypeVar

from tqdm import tqdm

from omnisieve.data.batch import BadSample, Batch, LoweredFps
from omnisieve.training.distributed import Ranks
from omnisieve.training.errors import writing

BAD_SAMPLES_FILE = "bad_samples.jsonl"
LOWERED_FPS_FILE = "lowered_fps.jsonl"
_FILES: Mapping[type, str] = {BadSample: BAD_SAMPLES_FILE, LoweredFps: LOWERED_FPS_FILE}

Entry = TypeVar("Entry", BadSample, LoweredFps)


class SampleReports:
    """All reports of a run; ranks call `share` on the same steps."""

    def __init__(self, directory: Path, ranks: Ranks) -> None:
        """`directory`: of the run."""
        self._bad = SampleReport(directory, ranks, BadSample)
        self._lowered = SampleReport(directory, ranks, LoweredFps)

    def note(self, batch: Batch) -> None:
        """Remember what this rank met in a batch."""
        self._bad.note(batch.failures)
        self._lowered.note(batch.lowered)

    def share(self) -> None:
        """Write down what any rank has noted since the last time."""
        self._bad.share()
        self._lowered.share()


class SampleReport(Generic[Entry]):
    """Writes everything of one kind down once per run, whichever ranks meet it and however often.

    Ranks note what they meet on their own, and put it together when all of them call `share`; only the first writes.
    A run that goes on from a checkpoint adds to its file.
    """

    def __init__(self, directory: Path, ranks: Ranks, kind: type[Entry]) -> None:
        """
        Args:
            directory: of the run.
            ranks: this process among its peers.
            kind: of entries; each has a file of its own.
        """
        self._path = directory / _FILES[kind]
        self._ranks = ranks
        self._kind: type[Entry] = kind
        self._known: set[tuple[str, ...]] | None = None
        self._pending: dict[tuple[str, ...], Entry] = {}

    def note(self, found: Iterable[Entry]) -> None:
        """Remember what this rank met."""
        for entry in found:
            if self._known is None or entry.key not in self._known:
                self._pending.setdefault(entry.key, entry)

    def share(self) -> None:
        """Write down what any rank has noted since the last time; all ranks call this, on the same step.

        Raises:
            OutputError: it cannot be written.
        """
        known = self._known if self._known is not None else self._written()
        new: dict[tuple[str, ...], Entry] = {}
        for part in self._ranks.gather(list(self._pending.values())):
            for entry in part:
                if entry.key not in known:
                    new.setdefault(entry.key, entry)
        self._pending.clear()
        self._known = known | new.keys()
        if not new or not self._ranks.is_first:
            return
        with writing("the list of samples", self._path), self._path.open("a", encoding="utf-8") as file:
            for entry in new.values():
                file.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")
                tqdm.write(str(entry), file=sys.stderr)

    def _written(self) -> set[tuple[str, ...]]:
        """What the run has written down before; of a line that a kill cut short nothing stays."""
        if not self._ranks.is_first or not self._path.exists():
            return set()
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            self._path.write_text("".join(whole), encoding="utf-8")
        return {self._kind(**json.loads(line)).key for line in whole}
