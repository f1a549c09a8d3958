"""A run that hangs ends, and says where it hung."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from omnisieve.training import watchdog
from omnisieve.training.watchdog import Watchdog


def hang_here() -> None:
    time.sleep(60)


def test_a_run_that_hangs_ends_with_its_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(watchdog, "_GRACE_SECONDS", 1.0)
    child = os.fork()
    if child == 0:
        with Watchdog(tmp_path / "run", 3, 0.2):
            hang_here()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    path = tmp_path / "run" / "stacks-rank-3.txt"
    assert "in hang_here" in path.read_text()
    told = capfd.readouterr().err
    assert "rank 3: no step has ended for 0.2 s (train.watchdog_seconds)" in told
    assert str(path) in told


def test_a_run_that_goes_on_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with Watchdog(tmp_path, 0, 1.0) as dog:
        for _ in range(6):
            time.sleep(0.25)
            dog.beat()
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().err == ""


def test_no_watch_is_kept_without_a_limit(tmp_path: Path):
    with Watchdog(tmp_path / "run", 0, 0.0) as dog:
        dog.beat()
    assert not (tmp_path / "run").exists()
