"""Signals are requests; the second is an order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

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
def test_the_second_signal_ends_at_once(number: signal.Signals, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(interruption, "_ECHO_SECONDS", 0.0)

    def job() -> None:
        with Interruption():
            send(number, number)
            time.sleep(30)

    assert status_of(job) == 128 + number


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_what_a_launcher_sends_after_all_processes_were_signalled_is_no_second_signal(first: signal.Signals):
    def job() -> None:
        with Interruption():
            send(first, signal.SIGTERM, first)

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


PRINT_LAUNCHERS = f"import runpy; print(*runpy.run_path({interruption.__file__!r})['LAUNCHERS'])"
START = "import subprocess, sys; print('pid', __import__('os').getpid()); sys.stdout.flush(); subprocess.run({!r})"


@pytest.mark.parametrize(("name", "watched"), [("torchrun", True), ("deepspeed", True), ("launch.py", False)])
def test_launchers_are_known_by_their_names(tmp_path: Path, name: str, watched: bool):
    (tmp_path / name).write_text(START.format([sys.executable, "-c", PRINT_LAUNCHERS]))
    command = [sys.executable, str(tmp_path / name), "--nproc_per_node", "2"]
    pid, found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert found == (pid.removeprefix("pid ") if watched else "")


def test_both_levels_of_deepspeed_are_known(tmp_path: Path):
    """A module's name stands behind -m; this is no module of that name, but its command line says so."""
    inner = [sys.executable, "-c", START.format([sys.executable, "-c", PRINT_LAUNCHERS]), "deepspeed.launcher.launch"]
    (tmp_path / "deepspeed").write_text(START.format(inner))
    command = [sys.executable, str(tmp_path / "deepspeed")]
    *pids, found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert found.split() == [line.removeprefix("pid ") for line in reversed(pids)]


def test_the_end_of_a_launcher_asks_and_is_no_signal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(interruption, "_LOOK_SECONDS", 0.01)
    reader, writer = os.pipe()

    def rank(launcher: int) -> None:
        monkeypatch.setattr(interruption, "LAUNCHERS", (launcher,))
        with Interruption() as request:
            time.sleep(0.1)
            os.write(writer, f"{request.asked} ".encode())
            os.kill(launcher, signal.SIGKILL)
            wait_for(lambda: request.asked)
            send(signal.SIGTERM)  # the scheduler's, to all processes
            os.write(writer, f"{request.asked}".encode())

    def launch() -> None:
        launcher = os.getpid()
        if os.fork() == 0:
            rank(launcher)
            os._exit(0)
        os.close(writer)
        time.sleep(30)

    assert status_of(launch) == -signal.SIGKILL
    os.close(writer)
    with os.fdopen(reader) as told:
        assert told.read() == "False True"
