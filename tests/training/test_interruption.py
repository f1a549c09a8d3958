"""Signals are requests; the second is an order."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from omnisieve.training import interruption
from omnisieve.training.interruption import Interruption

ENDED_BY_ITSELF = 7


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.05)  # two equal signals at once would be one


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def status_of(job: Callable[[], None]) -> int:
    """Exit status of a forked process that runs `job`."""
    child = os.fork()
    if child == 0:
        job()
        time.sleep(0.2)
        os._exit(ENDED_BY_ITSELF)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks(number: signal.Signals, capfd: pytest.CaptureFixture[str]):
    before = signal.getsignal(number)
    with Interruption() as request:
        assert not request.asked
        send(number)
        wait_for(lambda: request.asked)
        assert request.asked
    assert signal.getsignal(number) == before
    assert f"{number.name}: ending after this step" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_at_once(number: signal.Signals):
    def job() -> None:
        with Interruption():
            send(number, number)
            time.sleep(30)

    assert status_of(job) == 128 + number


def test_what_a_launcher_sends_after_ctrl_c_is_no_second_signal():
    def job() -> None:
        with Interruption():
            send(signal.SIGINT, signal.SIGTERM)

    assert status_of(job) == ENDED_BY_ITSELF


def test_another_signal_later_ends_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(interruption, "_ECHO_SECONDS", 0.0)

    def job() -> None:
        with Interruption():
            send(signal.SIGINT, signal.SIGTERM)
            time.sleep(30)

    assert status_of(job) == 128 + signal.SIGTERM


def test_processes_that_a_rank_starts_go_on():
    with Interruption() as request:
        assert status_of(lambda: send(signal.SIGTERM, signal.SIGTERM, signal.SIGINT)) == ENDED_BY_ITSELF
        assert not request.asked


def test_nothing_ends_a_process_that_has_honoured_the_request():
    def job() -> None:
        with Interruption() as request:
            send(signal.SIGTERM)
            wait_for(lambda: request.asked)
            request.honoured = True
        send(signal.SIGTERM, signal.SIGINT)

    assert status_of(job) == ENDED_BY_ITSELF
