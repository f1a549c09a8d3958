"""What ranks need before they can start."""

import os
import sysconfig
import time
from pathlib import Path

import pytest

from omnisieve.training.distributed import announce_compilation, check_compiler, complete_environment, operator_folder
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


@pytest.mark.parametrize(
    ("compiled", "lock_age", "told"),
    [
        (False, None, "compiling DeepSpeed's operator"),
        (True, None, ""),
        (False, 10**6, "remove the file: rm {lock}"),
        (True, 10**6, "remove the file: rm {lock}"),
        (True, 0, ""),  # of a rank of the same start
    ],
)
def test_a_start_says_what_it_waits_for(
    compiled: bool,
    lock_age: float | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = operator_folder()
    assert tmp_path in folder.parents
    if compiled:
        (folder / "deepspeed_shm_comm.so").touch()
    lock = folder / "lock"
    if lock_age is not None:
        lock.touch()
        os.utime(lock, (time.time() - lock_age,) * 2)
    announce_compilation()
    printed = capsys.readouterr().err
    assert printed == "" if not told else told.format(lock=lock) in printed


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
