"""SIGTERM and SIGINT as a request: the run ends after its step, with a checkpoint. A second one ends it at once.

Signals are heard in a thread, also while the main thread waits inside a library for other ranks. Processes that a rank
starts ignore them: launchers signal whole process trees, and a step that is being finished needs its data.

A launcher that ends before its ranks is a request, too: the command `deepspeed` dies of a signal without a word to
the processes below it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path
from types import TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A terminal and a cluster's scheduler signal every process of a run, and then launchers signal all ranks again.
_ECHO_SECONDS = 1.0
# How soon the end of a launcher is noticed.
_LOOK_SECONDS = 1.0
_LAUNCHERS = {
    "deepspeed",
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torchrun",
    "torch.distributed.run",
}


def _ancestors() -> Iterator[int]:
    """Ids of the processes above this one, the nearest first."""
    process = os.getppid()
    while process:
        yield process
        process = _parent(process)


def _parent(process: int) -> int:
    """Its parent's id; 0: there is none, or the process has ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(state.rpartition(")")[2].split()[1])  # the name in parentheses may hold anything


def _is_launcher(process: int) -> bool:
    """Whether a process is Python that runs one of `_LAUNCHERS` as script or module."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return False
    return Path(words[0]).name.startswith("python") and any(Path(word).name in _LAUNCHERS for word in words[1:4])


# `torchrun`, or the two levels of `deepspeed`. Looked up now: while an LLM loads, which takes minutes, they may end.
LAUNCHERS = tuple(takewhile(_is_launcher, _ancestors()))


def launcher_is_gone() -> bool:
    """Whether one of the processes that launched this one has ended."""
    return tuple(islice(_ancestors(), len(LAUNCHERS))) != LAUNCHERS


class Interruption:
    """Listens to signals while it is entered, in the main thread.

    Attributes:
        asked: whether this process was asked to end, or lost its launcher.
        honoured: set by whoever acted upon it; from the exit of the context on, signals then change nothing, because
            launchers pass them on rank after rank, the last ones while the process is already leaving.
    """

    def __init__(self) -> None:
        self.asked = self.honoured = False
        self._asked_at = 0.0

    def __enter__(self) -> Interruption:
        self._mouth, ear = socket.socketpair()
        self._mouth.setblocking(False)
        self._handlers = {number: signal.signal(number, _note) for number in SIGNALS}
        self._descriptor = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(ear,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self.honoured else handler)
        signal.set_wakeup_fd(self._descriptor)
        self._mouth.close()  # ends the thread

    def _listen(self, ear: socket.socket) -> None:
        ear.settimeout(_LOOK_SECONDS)
        with ear:
            while True:
                try:
                    numbers = ear.recv(1)
                except TimeoutError:
                    if launcher_is_gone():
                        self._ask("the launcher is gone")
                    continue
                if not numbers:
                    return
                if numbers[0] in SIGNALS:
                    self._hear(signal.Signals(numbers[0]), time.monotonic())

    def _hear(self, number: signal.Signals, now: float) -> None:
        if not self.asked:
            self._ask(number.name)
        elif now - self._asked_at > _ECHO_SECONDS:
            os._exit(128 + number)

    def _ask(self, reason: str) -> None:
        if self.asked:
            return
        self._asked_at = time.monotonic()
        self.asked = True
        print(f"{reason}: ending after this step; a second signal ends at once", file=sys.stderr, flush=True)


def ignore_signals(worker: int = 0) -> None:
    """Leave signals to the rank that started this process; in a `DataLoader`, which gives its workers others."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame: object) -> None:
    """A handler in Python is what makes the interpreter pass a signal's number to the thread."""


def _ignore_in_child() -> None:
    """A forked process would tell its parent's thread of its own signals."""
    if signal.getsignal(signal.SIGTERM) is _note:
        signal.set_wakeup_fd(-1)
        ignore_signals()


os.register_at_fork(after_in_child=_ignore_in_child)
