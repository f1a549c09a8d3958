"""What ranks need before they can start."""

import os
import sysconfig
from pathlib import Path

import pytest

from omnisieve.training.distributed import check_compiler, complete_environment
from omnisieve.training.errors import TrainingError

PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def test_a_machine_without_a_compiler_is_told_the_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TrainingError, match="install g\\+\\+"):
        check_compiler()


def test_a_machine_without_headers_is_told_the_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(TrainingError, match="python3-dev"):
        check_compiler()


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", {})
    complete_environment()
    assert {name: os.environ[name] for name in PLACES[:4]} == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }
    assert int(os.environ["MASTER_PORT"]) > 1023


def test_a_launchers_environment_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    given = dict(zip(PLACES, ("1", "2", "1", "host", "29500"), strict=True))
    monkeypatch.setattr(os, "environ", dict(given))
    complete_environment()
    assert os.environ == given
