"""Checkpoints are whole or absent, and refused when they do not fit."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omnisieve.config import TrainConfig, read_config
from omnisieve.training.checkpoint import CheckpointStore, run_identity, verify
from omnisieve.training.errors import CheckpointError, OutputError
from tests.training.runs import Alone


@dataclass
class Engine:
    """Stands for DeepSpeed's: writes one file, notes what it loads, dies as it is told to."""

    failure: BaseException | None = None
    loaded: list[Path] = field(default_factory=list)

    def save_checkpoint(self, folder: str, tag: str, **_: Any) -> None:
        path = Path(folder) / tag
        path.mkdir()
        (path / "states.pt").write_text("weights")
        if self.failure is not None:
            raise self.failure

    def load_checkpoint(self, folder: str, tag: str, **_: Any) -> None:
        self.loaded.append(Path(folder) / tag)


def make_store(folder: Path, *, limit: int = 2, ranks: int = 1, width: int = 16) -> CheckpointStore:
    return CheckpointStore(folder, Alone(world_size=ranks), identity={"compressor.width": width}, limit=limit)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("checkpoint-*"))


def test_latest_is_found_and_gives_the_state_back(tmp_path: Path):
    store, engine = make_store(tmp_path), Engine()
    store.save(engine, 9, {"best_loss": 0.5})
    path = store.save(engine, 10, {"best_loss": 0.25})
    assert store.find("auto") == path
    state = store.load(engine, path)
    assert (state["step"], state["best_loss"]) == (10, 0.25)
    assert engine.loaded == [path / "engine"]


def test_infinite_loss_survives(tmp_path: Path):
    store = make_store(tmp_path)
    assert store.load(Engine(), store.save(Engine(), 1, {"best_loss": float("inf")}))["best_loss"] == float("inf")


def test_only_the_newest_are_kept(tmp_path: Path):
    store = make_store(tmp_path, limit=2)
    for step in (8, 9, 10):
        store.save(Engine(), step, {})
    assert steps(tmp_path) == ["checkpoint-10", "checkpoint-9"]


def test_a_save_that_dies_leaves_the_last_checkpoint(tmp_path: Path):
    store = make_store(tmp_path)
    first = store.save(Engine(), 1, {})
    with pytest.raises(KeyboardInterrupt):
        store.save(Engine(KeyboardInterrupt()), 2, {})
    assert store.find("auto") == first
    assert steps(tmp_path) == ["checkpoint-1"]
    assert store.save(Engine(), 2, {}) == store.find("auto")


def killed_while_saving(folder: Path, step: int, access: int) -> bool:
    """Whether SIGKILL came before the save had ended: at the access of this number to a file of the run."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal access
        if any(str(argument).startswith(str(folder)) for argument in arguments):
            access -= 1
            if access < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        sys.addaudithook(watch)
        make_store(folder, limit=1).save(Engine(), step, {"save": "second"})
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("before", "step"),
    [
        ((1,), 2),
        ((1,), 1),
        pytest.param((1, 2), 1, marks=pytest.mark.slow),
        pytest.param((2, 1), 2, marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_any_point_of_a_save_leaves_a_complete_latest(
    tmp_path: Path, before: Sequence[int], step: int, monkeypatch: pytest.MonkeyPatch
):
    """Of another step, and of one that is there already, as after a checkpoint was resumed that is not the newest."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and for power failures only
    for number in before:
        make_store(tmp_path / "before").save(Engine(), number, {"save": "first"})
    access, found = 0, set()
    while True:
        folder = tmp_path / f"access-{access}"
        shutil.copytree(tmp_path / "before", folder)
        killed = killed_while_saving(folder, step, access)
        store, engine = make_store(folder, limit=1), Engine()
        latest = store.find("auto")
        assert latest is not None
        state = store.load(engine, latest)
        found.add((state["step"], state["save"]))
        for path in folder.glob("checkpoints/checkpoint-*"):
            verify(path)
        store.save(engine, 3, {})
        assert {path.name for path in store.folder.iterdir()} == {"checkpoint-3", "latest"}
        if not killed:
            break
        access += 1
    assert found == {(before[-1], "first"), (step, "second")}
    assert access > 20


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system"),
    ],
)
def test_a_disk_that_refuses_is_named_and_the_last_checkpoint_stays(tmp_path: Path, failure: OSError, reason: str):
    store = make_store(tmp_path, limit=1)
    first = store.save(Engine(), 1, {})
    told = rf"cannot write the checkpoint of step 2 to .*checkpoint-2: {reason} \(\d+ MiB are free"
    with pytest.raises(OutputError, match=told):
        store.save(Engine(failure), 2, {})
    assert store.find("auto") == first
    verify(first)
    # What was left of the attempt goes with the next one.
    assert store.save(Engine(), 3, {}) == store.find("auto")
    assert {path.name for path in store.folder.iterdir()} == {"checkpoint-3", "latest"}


def test_a_file_that_torch_cannot_write_whole_is_refused_alike(tmp_path: Path):
    store = make_store(tmp_path)
    first = store.save(Engine(), 1, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # stands for a full disk
    try:
        with pytest.raises(OutputError, match="cannot write the checkpoint of step 2"):
            store.save(Engine(), 2, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert store.find("auto") == first
    verify(first)


def test_other_errors_are_not_taken_for_the_disks(tmp_path: Path):
    with pytest.raises(RuntimeError, match="shapes differ"):
        make_store(tmp_path).save(Engine(RuntimeError("shapes differ")), 1, {})


def test_a_step_is_saved_again_after_going_back(tmp_path: Path):
    store = make_store(tmp_path)
    for step in (1, 2, 1):
        path = store.save(Engine(), step, {"round": step})
    assert store.find("auto") == path
    assert path.name == "checkpoint-1"


@pytest.mark.parametrize("name", ["engine/states.pt", "random_state_rank_0.pt", "state.json"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damage_is_found_before_anything_is_loaded(tmp_path: Path, name: str, damage: str):
    store, engine = make_store(tmp_path), Engine()
    path = store.save(engine, 1, {})
    if damage == "changed":
        (path / name).write_bytes((path / name).read_bytes() + b" ")
    else:
        (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        store.load(engine, path)
    assert engine.loaded == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"ranks": 2}, "number of ranks was 1, is 2"), ({"width": 32}, "compressor.width was 16, is 32")],
)
def test_another_run_is_refused(tmp_path: Path, changed: dict[str, int], told: str):
    path = make_store(tmp_path).save(Engine(), 1, {})
    engine = Engine()
    with pytest.raises(CheckpointError, match=told):
        make_store(tmp_path, **changed).load(engine, path)
    assert engine.loaded == []


@pytest.mark.parametrize(
    "change",
    ["train.lr=0.5", "train.weight_decay=0.5", "train.estimator.route=masked", "data.audio.max_seconds=9",
     "compressor.width=32", "train.micro_batch_size=2", "train.ratio={min: 0.1, max: 0.5}", "model.dtype=float32",
     "train.init_from=other"],
)  # fmt: skip
def test_a_change_of_the_mathematics_is_refused_by_its_name(tmp_path: Path, change: str):
    path = store_of(tmp_path).save(Engine(), 1, {})
    key = change.partition("=")[0]
    with pytest.raises(CheckpointError, match=rf"another run \({key}.* was .*, is .*\): use the same settings"):
        store_of(tmp_path, change).load(Engine(), path)


def test_what_changes_no_gradient_may_change(tmp_path: Path):
    path = store_of(tmp_path).save(Engine(), 1, {})
    changes = (
        "train.max_steps=20", "train.stop_at=15", "train.log_every=1", "train.eval_every=7", "train.save_every=3",
        "train.save_total_limit=9", "train.resume=never", "train.gradient_checkpointing=true", "data.workers=9",
        "data.feature_cache=cache", "data.feature_cache_dtype=int8",
        "output_dir=moved", "model.attn_implementation=eager", "train.max_bad_steps=9",
        "train.watchdog_seconds=60",
    )  # fmt: skip
    assert store_of(tmp_path, *changes).load(Engine(), path)["step"] == 1


@pytest.mark.parametrize(("before", "after"), [(None, "int8"), ("int8", None), ("int8", "bfloat16")])
def test_features_rounded_in_another_way_are_another_run(tmp_path: Path, before: str | None, after: str | None):
    path = store_of(tmp_path, rounding=before).save(Engine(), 1, {})
    told = f"rounding of cached features was {before}, is {after}"
    with pytest.raises(CheckpointError, match=told):
        store_of(tmp_path, rounding=after).load(Engine(), path)
    assert store_of(tmp_path, rounding=before).load(Engine(), path)["step"] == 1


def test_media_that_are_read_in_another_way_are_another_run(tmp_path: Path):
    before = {"fps": 2.0, "video_size": {"longest_edge": 100}}
    path = store_of(tmp_path, "data.fps=2", reading=before).save(Engine(), 1, {})
    # It does not matter which keys said so.
    assert store_of(tmp_path, "data.protocol=omnisift", reading=before).load(Engine(), path)["step"] == 1
    with pytest.raises(CheckpointError, match=r"reading\.video_size\.longest_edge was 100, is 90"):
        store_of(tmp_path, "data.fps=2", reading=before | {"video_size": {"longest_edge": 90}}).load(Engine(), path)


def test_monitors_of_deepspeed_may_change_and_its_numbers_may_not(tmp_path: Path):
    path = store_of(tmp_path).save(Engine(), 1, {})
    watched = "train.deepspeed={wall_clock_breakdown: true, zero_optimization: {reduce_bucket_size: 64}}"
    assert store_of(tmp_path, watched).load(Engine(), path)["step"] == 1
    with pytest.raises(CheckpointError, match=r"train\.deepspeed\.communication_data_type was None, is bf16"):
        store_of(tmp_path, "train.deepspeed={communication_data_type: bf16}").load(Engine(), path)


def store_of(
    folder: Path, *overrides: str, rounding: str | None = None, reading: dict[str, Any] | None = None
) -> CheckpointStore:
    """The checkpoints of a run with this configuration."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "{model: {path: m}, compressor: {method: omnisift, width: 16}, data: {train: t}, output_dir: o, "
        "train: {max_steps: 10, estimator: {route: hard_drop}}}"
    )
    identity = run_identity(read_config(TrainConfig, recipe, overrides), rounding, reading)
    return CheckpointStore(folder, Alone(), identity=identity)


def test_what_resume_means(tmp_path: Path):
    store = make_store(tmp_path)
    assert store.find("auto") is None
    assert store.find("never") is None
    path = store.save(Engine(), 1, {})
    assert store.find("auto") == store.find(str(path)) == path
    with pytest.raises(CheckpointError, match="no checkpoint"):
        store.find(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("remains", ["best", "last", "checkpoints"])
def test_a_new_run_does_not_begin_in_the_folder_of_another(tmp_path: Path, remains: str):
    elsewhere = make_store(tmp_path / "a").save(Engine(), 1, {})
    store = make_store(tmp_path / "b")
    if remains == "checkpoints":
        own = store.save(Engine(), 1, {})
        assert store.find("auto") == store.find(str(own)) == own
    else:
        (tmp_path / "b" / remains).mkdir(parents=True)
    for resume in ("never", str(elsewhere)):
        with pytest.raises(CheckpointError, match=rf"b holds {remains}.* of another run, .*choose another output_dir"):
            store.find(resume)


def test_a_run_without_checkpoints_begins_again_unless_it_had_ended(tmp_path: Path):
    store = make_store(tmp_path)
    (tmp_path / "best").mkdir()
    assert store.find("auto") is None
    (tmp_path / "last").mkdir()
    with pytest.raises(CheckpointError, match="holds last, best of another run"):
        store.find("auto")


def test_random_generators_go_on_where_they_were(tmp_path: Path):
    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))

    store = make_store(tmp_path)
    np.random.randn()  # leaves a cached second value behind
    path = store.save(Engine(), 1, {})
    expected = draw()
    assert draw() != expected
    store.load(Engine(), path)
    assert draw() == expected
