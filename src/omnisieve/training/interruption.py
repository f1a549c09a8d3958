"""SIGTERM and SIGINT as a request: the run ends after its step, with a checkpoint. A second one ends it at once.

Signals are heard in a thread, also while the main thread waits inside a library for other ranks. Processes that a rank
starts ignore them: launchers signal whole process trees, and a step that is being finished needs its data.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# After Ctrl-C on a terminal, which reaches every process, launchers send another signal to all ranks.
_ECHO_SECONDS = 1.0


class Interruption:
    """Listens to signals while it is entered, in the main thread.

    Attributes:
        asked: whether this process was asked to end.
        honoured: set by whoever acted upon it; from the exit of the context on, signals then change nothing, because
            launchers pass them on rank after rank, the last ones while the process is already leaving.
    """

    def __init__(self) -> None:
        self.asked = self.honoured = False
        self._first: tuple[int, float] | None = None

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
        with ear:
            while numbers := ear.recv(1):
                if numbers[0] in SIGNALS:
                    self._hear(signal.Signals(numbers[0]), time.monotonic())

    def _hear(self, number: signal.Signals, now: float) -> None:
        if self._first is None:
            self._first = number, now
            self.asked = True
            print(f"{number.name}: ending after this step; a second signal ends at once", file=sys.stderr, flush=True)
        elif number == self._first[0] or now - self._first[1] > _ECHO_SECONDS:
            os._exit(128 + number)


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
