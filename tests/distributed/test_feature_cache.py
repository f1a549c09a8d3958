"""The feature cache as users make it and train from it: processes of their own, real clips, the shipped LLM."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.distributed.programs import arguments, family, finish, largest_difference, start, train

TOOL = "tools/cache_features.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# It starts from statistics of the encoders, too.
OPTIONS = ("train.max_steps=4", "train.init_from=visionzip_om", "train.eval_every=0")


@pytest.mark.slow
def test_training_from_the_cache_is_training_online(clips: Path, tmp_path: Path):
    """One process is killed while it fills the cache, two complete it; both trainings end with the same numbers."""
    folder = tmp_path / "cache"
    cached = arguments(clips, tmp_path / "cached", f"data.feature_cache={folder}", *OPTIONS)
    kill_when_begun(cached, folder)
    assert not (folder / "index.json").exists()
    output = fill(cached, *TORCHRUN)
    assert f"{folder}: 7 files encoded, 0 were there already, 0 could not be read" in output
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors", ".safetensors"]
    for words in (cached, arguments(clips, tmp_path / "online", *OPTIONS)):
        status, output = train(*words)
        assert status == 0, output
    assert largest_difference(tmp_path / "cached", tmp_path / "online") <= 1e-6
    rounded = (f"data.feature_cache={tmp_path / 'int8'}", "data.feature_cache_dtype=int8", "train.max_steps=6")
    fill([*cached, *rounded])
    status, output = train(*cached, *rounded)
    assert status == 1
    assert "rounding of cached features was None, is int8" in output


def fill(words: list[str], *launcher: str) -> str:
    """What the tool prints."""
    status, output = finish(start([sys.executable, *launcher, TOOL, *words]))
    assert status == 0, output
    return output


def kill_when_begun(words: list[str], folder: Path) -> None:
    """SIGKILL to the tool and its workers as soon as it tells that a file is done."""
    process = start([sys.executable, TOOL, *words])
    end = time.monotonic() + 300
    while not list(folder.glob(".run-*/*.json")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    for member in family(process):
        member.kill()
    finish(process)
