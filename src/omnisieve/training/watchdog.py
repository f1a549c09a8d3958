"""A run that hangs ends with the stacks of every rank on the disk, instead of holding its accelerators for ever."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from omnisieve.training.errors import writing

# Ranks hang together, and a launcher kills the others when the first is gone: each has this long to write its stacks.
_GRACE_SECONDS = 10.0


class Watchdog:
    """Ends the process when `beat` is not called for a while.

    Two clocks run. A thread of Python says what happens and writes the stacks. A little later the interpreter's own
    fault handler ends the process, which it can even when a library spins without ever giving Python a turn; it writes
    the stacks, too.
    """

    def __init__(self, directory: Path, rank: int, seconds: float) -> None:
        """
        Args:
            directory: the run's folder; `stacks-rank-RANK.txt` stays there if it comes to that.
            rank: of this process.
            seconds: longest time between two beats; 0: no watch is kept.
        """
        self._path = directory / f"stacks-rank-{rank}.txt"
        self._rank = rank
        self._seconds = seconds
        self._ended = threading.Event()
        self._deadline = 0.0

    def __enter__(self) -> Watchdog:
        if self._seconds:
            # Opened now: later the disk may be what everybody waits for.
            with writing("stacks", self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("w", encoding="utf-8")
            self.beat()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def beat(self) -> None:
        """Say that the run goes on."""
        if self._seconds:
            self._deadline = time.monotonic() + self._seconds
            faulthandler.dump_traceback_later(self._seconds + _GRACE_SECONDS, exit=True, file=self._file)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._seconds:
            self._ended.set()
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._path.unlink(missing_ok=True)

    def _watch(self) -> None:
        while not self._ended.wait(max(self._deadline - time.monotonic(), 0)):
            if time.monotonic() >= self._deadline:
                self._tell()
                return

    def _tell(self) -> None:
        faulthandler.dump_traceback(self._file)
        print(
            f"train.py: rank {self._rank}: no step has ended for {self._seconds:g} s (train.watchdog_seconds), the run "
            f"ends now. What each thread was doing stands in {self._path}. Ranks that wait for each other, a file "
            "system that does not answer and a limit below the time of a step are the usual reasons",
            file=sys.stderr,
            flush=True,
        )
