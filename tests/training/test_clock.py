"""Where the time of steps goes."""

from __future__ import annotations

import itertools

import pytest
import torch

from omnisieve.training.clock import Clock

CPU = torch.device("cpu")


class Queue:
    """A device that is `lag` marks behind the host; its marks are a second apart."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self.made = itertools.count()
        self.reached = 0
        self.waits = 0

    def mark(self) -> Moment:
        number = next(self.made)
        self.reached = max(self.reached, number - self.lag)
        return Moment(self, number)


class Moment:
    def __init__(self, queue: Queue, number: int) -> None:
        self.queue, self.number = queue, number

    def query(self) -> bool:
        return self.number <= self.queue.reached

    def synchronize(self) -> None:
        self.queue.waits += not self.query()
        self.queue.reached = max(self.queue.reached, self.number)

    def elapsed_time(self, end: Moment) -> float:
        assert self.query()
        assert end.query(), "a device's time is known when it has passed"
        return 1000.0 * (end.number - self.number)


def step(clock: Clock, *laps: str) -> None:
    clock.start()
    for name in laps:
        clock.lap(name)
    clock.stop()


@pytest.mark.parametrize("lag", [0, 1, 5, 100])
def test_laps_are_the_devices_and_only_reading_waits(lag: int):
    queue = Queue(lag)
    clock = Clock(CPU, queue.mark)
    for _ in range(3):
        step(clock, "data_wait", "forward", "backward", "forward", "backward")
    assert queue.waits == 0
    found = clock.read()
    assert (queue.waits > 0) == (lag > 0)
    assert {name: found[name] for name in found if name != "step"} == {
        "data_wait": 1.0,
        "forward": 2.0,
        "backward": 2.0,
    }


def test_no_more_marks_are_held_than_the_device_is_behind():
    clock = Clock(CPU, Queue(3).mark)
    for _ in range(50):
        step(clock, "forward", "backward")
        assert len(clock._open) <= 4


def test_nothing_is_measured_between_steps():
    clock = Clock(CPU, Queue(0).mark)
    step(clock, "forward")
    clock.lap("encoders")  # of a validation
    step(clock, "forward")
    assert clock.read().keys() == {"step", "forward"}


def test_a_restart_begins_anew():
    clock = Clock(CPU, Queue(100).mark)
    step(clock, "backward")
    clock.restart()
    step(clock, "forward")
    assert clock.steps == 1
    assert clock.read().keys() == {"step", "forward"}


def test_laps_on_a_cpu_are_parts_of_the_step():
    clock = Clock(CPU)
    step(clock, "forward", "backward")
    found = clock.read()
    assert min(found.values()) >= 0
    assert found.pop("step") >= sum(found.values()) * (1 - 1e-6)
