"""The record of samples that could not be read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from omnisieve.data.batch import BadSample
from omnisieve.training.distributed import Ranks

BAD_SAMPLES_FILE = "bad_samples.jsonl"


class BadSamples:
    """Writes every bad file down once per run, whichever ranks meet it and however often.

    Ranks note what they meet on their own, and put it together when all of them call `share`; only the first writes.
    A run that goes on from a checkpoint adds to its file.
    """

    def __init__(self, directory: Path, ranks: Ranks) -> None:
        """`directory`: of the run."""
        self._path = directory / BAD_SAMPLES_FILE
        self._ranks = ranks
        self._known: set[str] | None = None
        self._pending: dict[str, BadSample] = {}

    def note(self, found: Iterable[BadSample]) -> None:
        """Remember what this rank met."""
        for bad in found:
            if self._known is None or bad.path not in self._known:
                self._pending.setdefault(bad.path, bad)

    def share(self) -> None:
        """Write down what any rank has noted since the last time; all ranks call this, on the same step."""
        known = self._known if self._known is not None else self._written()
        new: dict[str, BadSample] = {}
        for part in self._ranks.gather(list(self._pending.values())):
            for bad in part:
                if bad.path not in known:
                    new.setdefault(bad.path, bad)
        self._pending.clear()
        self._known = known | new.keys()
        if not new or not self._ranks.is_first:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for bad in new.values():
                file.write(json.dumps(asdict(bad), ensure_ascii=False) + "\n")
                tqdm.write(
                    f"replaced sample {bad.id} by {bad.replacement}: {bad.path}: {bad.reason} ({bad.kind}). "
                    f"Cure: {bad.cure}.",
                    file=sys.stderr,
                )

    def _written(self) -> set[str]:
        """What the run has written down before; of a line that a kill cut short nothing stays."""
        if not self._ranks.is_first or not self._path.exists():
            return set()
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            self._path.write_text("".join(whole), encoding="utf-8")
        return {json.loads(line)["path"] for line in whole}
