"""Mistakes that the user of a training run can cure."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# How torch says that it could not write or open a file; it raises no OSError.
_TORCH_WRITE_ERRORS = ("inline_container", "PytorchStreamWriter", "iostream error", "cannot be opened")


class TrainingError(ValueError):
    """A run cannot start or go on; the message says what, where and how to cure it."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be resumed from."""


class OutputError(TrainingError):
    """The run's folder cannot be written, for instance because the disk is full."""


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Say clearly what the file system refused inside.

    Args:
        what: is written, in a few words.
        path: of the file or folder, which may not exist yet.

    Raises:
        OutputError: instead of an OSError, and of torch's RuntimeError for the same thing.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(_refusal(what, path, error.strerror or str(error))) from error
    except RuntimeError as error:
        if not any(mark in str(error) for mark in _TORCH_WRITE_ERRORS):
            raise
        raise OutputError(_refusal(what, path, f"torch says {str(error).splitlines()[0]}")) from error


def _refusal(what: str, path: Path, reason: str) -> str:
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free / 2**20
    return (
        f"cannot write {what} to {path}: {reason} ({free:.0f} MiB are free there). What was written before stays "
        "whole: make room, check quota and permissions, and start again; train.resume=auto goes on from the last "
        "checkpoint"
    )
