"""Checkpoints to resume from: trainables, optimiser, schedule and random states, never the frozen LLM.

A checkpoint is a folder `checkpoint-STEP`. It is written under another name, flushed and renamed, so it is complete
or it is not there; `latest` is written after that. Whatever moment a run is killed at, `latest` names a complete one,
under its name or, while it is replaced by another of the same step, as `.replaced-checkpoint-STEP`. Its manifest holds
the hash of every file, and nothing is unpickled before they match. Even so, resume only from places you trust: a hash
does not make a pickle safe.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from omnisieve.config import TrainConfig
from omnisieve.files import flush, sha256
from omnisieve.training.distributed import Ranks
from omnisieve.training.errors import CheckpointError, writing

FOLDER = "checkpoints"
ENGINE_FOLDER = "engine"
LATEST_FILE = "latest"
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
# Exported compressors beside the checkpoints, in the run's folder.
LAST, BEST = "last", "best"
# What a run that resumes may change: it moves no gradient, or (the number of steps) is what one resumes for.
_FREE = {
    "model.attn_implementation",
    "model.encoder_attn_implementation",
    "data.workers",
    "data.recycle_after",
    "data.decode_seconds",
    *(f"data.{name}" for name in ("protocol", "fps", "min_frames", "max_frames", "min_pixels", "max_pixels")),
    "data.total_pixels",  # like the line above: what all of them come to is compared
    "data.feature_cache",
    "data.feature_cache_dtype",  # of writing one; `run_identity` has the rounding of the one that is read
    *(f"train.{name}" for name in ("max_steps", "stop_at", "resume", "gradient_checkpointing")),
    *(f"train.{name}" for name in ("log_every", "eval_every", "save_every", "save_total_limit")),
    *(f"train.{name}" for name in ("max_bad_steps", "watchdog_seconds")),
    "train.group_by_length",  # the sampler compares the lengths themselves
    *(f"train.{name}" for name in ("histogram_every", "probe_clips", "picture_limit")),
    "output_dir",
}


# Of DeepSpeed's settings those that can change a number; the others monitor, or divide the work in another way.
_DEEPSPEED = (
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "zero_optimization.zero_quantized",
)


def run_identity(
    config: TrainConfig, rounding: str | None = None, reading: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What must be the same in a run that resumes: dotted keys of its configuration, and values.

    Args:
        config: of the run.
        rounding: see `Streams`. A cache that rounds teaches something else; one that does not may come and go.
        reading: see `Streams`; how media are read, all values known.
    """
    identity = {key: value for key, value in _flat(asdict(config)) if key not in _FREE and _counts(key)}
    identity |= {f"reading.{key}": value for key, value in _flat(reading or {})}
    return identity if rounding is None else {**identity, "rounding of cached features": rounding}


def _counts(key: str) -> bool:
    prefix = "train.deepspeed."
    return not key.startswith(prefix) or key.removeprefix(prefix).startswith(_DEEPSPEED)


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class CheckpointStore:
    """The checkpoints of one run; all ranks see the same folder and call every method together."""

    def __init__(self, directory: Path, ranks: Ranks, *, identity: Mapping[str, Any], limit: int = 2) -> None:
        """Name the place.

        Args:
            directory: the run's folder.
            ranks: this process among its peers.
            identity: JSON values that must be the same in the run that resumes.
            limit: how many checkpoints are kept.
        """
        self.folder = directory / FOLDER
        self._directory = directory
        self._ranks = ranks
        self._identity = {**identity, "number of ranks": ranks.world_size}
        self._limit = limit

    def save(self, engine: Any, step: int, state: Mapping[str, Any]) -> Path:
        """Write `checkpoint-STEP` and remove the oldest ones beyond the limit.

        Args:
            engine: DeepSpeed's.
            step: optimiser steps done.
            state: JSON values that the run needs back.

        Returns:
            the folder.

        Raises:
            OutputError: it could not be written; the checkpoints that were there still are.
        """
        target = self.folder / f"checkpoint-{step}"
        with writing(f"the checkpoint of step {step}", target):
            return self._save(engine, step, state, target)

    def _save(self, engine: Any, step: int, state: Mapping[str, Any], target: Path) -> Path:
        staging = self.folder / f".{target.name}"
        if self._ranks.is_first:
            for remains in self.folder.glob(".checkpoint-*"):  # of a save that died; they may fill the disk
                shutil.rmtree(remains)
            staging.mkdir(parents=True)
        self._ranks.barrier()
        engine.save_checkpoint(str(staging), ENGINE_FOLDER, save_latest=False, exclude_frozen_parameters=True)
        torch.save(_random_state(), staging / _random_file(self._ranks.rank))
        self._ranks.barrier()
        if self._ranks.is_first:
            text = json.dumps({**state, "step": step, "identity": self._identity}, indent=2)
            (staging / STATE_FILE).write_text(text + "\n", encoding="utf-8")
            self._publish(staging, target)
        self._ranks.barrier()
        return target

    def find(self, resume: str) -> Path | None:
        """See `find_checkpoint`."""
        return find_checkpoint(self._directory, resume)

    def load(self, engine: Any, path: Path) -> dict[str, Any]:
        """Bring the engine and this rank's random generators to where they were.

        Returns:
            the `state` given to `save`, with "step".

        Raises:
            CheckpointError: files are damaged, or it was written by a run with another identity.
        """
        verify(path)
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        written, here = state["identity"], self._identity
        if changed := sorted(name for name in written | here if written.get(name) != here.get(name)):
            pairs = "; ".join(f"{name} was {written.get(name)}, is {here.get(name)}" for name in changed)
            raise CheckpointError(
                f"{path} belongs to another run ({pairs}): use the same settings, or choose another output_dir and "
                f"start from the weights with train.init_from"
            )
        engine.load_checkpoint(str(path), ENGINE_FOLDER, load_module_strict=False)
        _restore_random_state(torch.load(path / _random_file(self._ranks.rank), weights_only=True))
        return state

    def _publish(self, staging: Path, target: Path) -> None:
        hashes = {str(p.relative_to(staging)): sha256(p) for p in sorted(staging.rglob("*")) if p.is_file()}
        (staging / MANIFEST_FILE).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
        for path in (*staging.rglob("*"), staging):
            flush(path)
        if target.exists():
            # The same step is written again when an older checkpoint was resumed, or only a validation was left to do.
            replaced = self.folder / f".replaced-{target.name}"
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        staging.rename(target)
        flush(self.folder)
        latest = self.folder / f".{LATEST_FILE}"
        latest.write_text(f"{target.name}\n", encoding="utf-8")
        flush(latest)
        latest.rename(self.folder / LATEST_FILE)
        flush(self.folder)
        for replaced in self.folder.glob(".replaced-*"):
            shutil.rmtree(replaced)
        self._rotate(target)

    def _rotate(self, newest: Path) -> None:
        """Remove the oldest ones beyond the limit."""
        steps = sorted((int(p.name.rpartition("-")[2]), p) for p in self.folder.glob("checkpoint-*"))
        older = [path for step, path in steps if path != newest]
        for path in older[: max(len(older) + 1 - self._limit, 0)]:
            # Under its own name a checkpoint is never there in part.
            shutil.rmtree(path.rename(path.with_name(f".{path.name}")))


def find_checkpoint(directory: Path, resume: str) -> Path | None:
    """The checkpoint that `train.resume` means.

    Args:
        directory: the run's folder.
        resume: "auto": the latest one, None if there is none; "never": None; else the path of a checkpoint.

    Raises:
        CheckpointError: the path is no checkpoint; or the run's folder holds another run, whose checkpoints and
            exports would be taken for those of this one.
    """
    found = _named(directory / FOLDER, resume)
    latest = f"{FOLDER}/{LATEST_FILE}"
    remains = [name for name in (latest, LAST, BEST) if (directory / name).exists()]
    if resume == "auto" and remains == [BEST]:
        return found  # a run that was cut short before its first checkpoint begins again
    if remains and (found is None or found.parent.resolve() != (directory / FOLDER).resolve()):
        go_on = ", or go on with that run by train.resume=auto" if latest in remains else ""
        raise CheckpointError(
            f"{directory} holds {', '.join(remains)} of another run, and train.resume is {resume}: choose "
            f"another output_dir or move the folder away{go_on}"
        )
    return found


def _named(folder: Path, resume: str) -> Path | None:
    if resume == "never":
        return None
    if resume != "auto":
        path = Path(resume)
        if not (path / MANIFEST_FILE).is_file():
            there = ", ".join(str(found) for found in sorted(folder.glob("checkpoint-*"))) or "none"
            raise CheckpointError(
                f"train.resume: {path.absolute()} is no checkpoint; give the path of one (this run has {there})"
            )
        return path
    latest = folder / LATEST_FILE
    if not latest.is_file():
        return None
    path = folder / latest.read_text(encoding="utf-8").strip()
    replaced = folder / f".replaced-{path.name}"
    return replaced if replaced.is_dir() and not path.exists() else path


def verify(path: Path) -> None:
    """Compare a checkpoint with the hashes it was written with.

    Raises:
        CheckpointError: names every file that is missing or differs.
    """
    manifest = path / MANIFEST_FILE
    if not manifest.is_file():
        raise CheckpointError(f"{path} is no complete checkpoint: it has no {MANIFEST_FILE}")
    hashes = json.loads(manifest.read_text(encoding="utf-8"))
    bad = [name for name, wanted in hashes.items() if not (path / name).is_file() or sha256(path / name) != wanted]
    if bad:
        raise CheckpointError(
            f"{path} is damaged: {', '.join(bad)} missing or changed; copy it again, or name an older checkpoint "
            f"as train.resume"
        )


def _random_file(rank: int) -> str:
    return f"random_state_rank_{rank}.pt"


def _random_state() -> dict[str, Any]:
    """The states of all generators as tensors and numbers, which load without unpickling code."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "device": get_accelerator().get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }


def _restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    get_accelerator().set_rng_state(state["device"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
