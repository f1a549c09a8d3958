"""Where the time of training steps goes, without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A moment, perhaps one that a device has yet to reach; as torch's events."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float:
        """Milliseconds until `end`."""


class HostMark:
    """Now, on the host."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        """Whether it has passed: it has."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end: HostMark) -> float:
        """See `Mark`."""
        return 1000 * (end.seconds - self.seconds)


class Clock:
    """Times steps, and the laps that each is made of.

    On an accelerator the end of a lap is an event in its queue of work: a lap is the device's time, idle time included,
    and is read when the device has long passed it.
    """

    def __init__(self, device: torch.device, mark: Callable[[], Mark] | None = None) -> None:
        """
        Args:
            device: whose time it is.
            mark: makes a mark of now; the device's when None.
        """
        self._mark = mark or (HostMark if device.type == "cpu" else _device_mark(device))
        self._last: Mark | None = None
        self._open: deque[tuple[str, Mark, Mark]] = deque()
        self.restart()

    def restart(self) -> None:
        """Forget everything so far; between steps."""
        self.steps, self.run_seconds = 0, 0.0
        self._laps: dict[str, float] = {}
        self._open.clear()

    def start(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()
        self._last = self._mark()

    def lap(self, name: str) -> None:
        """The time since the last lap went to `name`; outside of steps nothing is measured."""
        if self._last is None:
            return
        now = self._mark()
        self._open.append((name, self._last, now))
        self._last = now
        # Those that the device has passed need not be kept.
        while self._open and self._open[0][2].query():
            self._close()

    def stop(self) -> None:
        """The step ends."""
        self._last = None
        self.steps += 1
        self.run_seconds += time.perf_counter() - self._began

    def read(self) -> dict[str, float]:
        """Mean seconds per step since the restart: of the whole "step" on the host, and of each lap.

        Waits for the device.
        """
        while self._open:
            self._open[0][2].synchronize()
            self._close()
        return {name: seconds / self.steps for name, seconds in ({"step": self.run_seconds} | self._laps).items()}

    def _close(self) -> None:
        name, start, end = self._open.popleft()
        self._laps[name] = self._laps.get(name, 0.0) + start.elapsed_time(end) / 1000


def _device_mark(device: torch.device) -> Callable[[], Mark]:
    event = torch.get_device_module(device).Event

    def mark() -> Mark:
        now = event(enable_timing=True)
        now.record()
        return now

    return mark
