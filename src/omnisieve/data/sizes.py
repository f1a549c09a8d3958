"""How many tokens every sample of a manifest has, known before anything is decoded.

A file of JSON lines that `tools/check_data.py` writes. The first says what it is about: the manifest's hash, and all of
the preprocessing that sizes depend on. Then comes a line per sample, in the manifest's order: [text and images, video,
audio], or null where a file of the sample is broken. Sound may be off by two tokens a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omnisieve.data.dataset import ATTEMPTS, substitute
from omnisieve.data.errors import DataError
from omnisieve.data.length_limit import LengthLimit
from omnisieve.files import replacing

_CURE = "run tools/check_data.py again, with the same recipe"


def write_sizes(
    path: Path, manifest: Path, preprocessing: Mapping[str, Any], sizes: Iterable[Sequence[int] | None]
) -> None:
    """Write such a file, all of it or nothing.

    Args:
        path: of the file.
        manifest: what it is about.
        preprocessing: see `MediaLoader.preprocessing`.
        sizes: of each sample, (text and images, video, audio); None if it is broken.
    """
    with replacing(path, lambda _: True) as staged, staged.open("w", encoding="utf-8") as file:
        for row in ({"manifest": _hash(manifest), "preprocessing": dict(preprocessing)}, *sizes):
            file.write(json.dumps(row) + "\n")


def check_sizes(path: Path, manifest: Path) -> None:
    """Look whether a file of sizes is about a manifest as it is now.

    Raises:
        DataError: there is no such file, or it is about another manifest.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file of sizes; tools/check_data.py writes one with --config")
    with path.open(encoding="utf-8") as file:
        head = json.loads(file.readline() or "null")
    if not isinstance(head, dict) or "manifest" not in head:
        raise DataError(f"{path} is no file of sizes: name the sizes.jsonl that tools/check_data.py writes")
    if head["manifest"] != _hash(manifest):
        raise DataError(f"{path} is about another manifest than {manifest} as it is now: {_CURE}")


def read_sizes(path: Path, manifest: Path, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """Sizes of all samples, [n, 3] int64: text and images, video, audio; -1 where a sample is broken.

    Args:
        path, manifest: as for `check_sizes`.
        preprocessing: that of this run.

    Raises:
        DataError: see `check_sizes`; or the sizes are those of other preprocessing.
    """
    check_sizes(path, manifest)
    with path.open(encoding="utf-8") as file:
        was, now = json.loads(next(file))["preprocessing"], json.loads(json.dumps(dict(preprocessing)))
        if different := sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key)):
            pairs = "; ".join(f"{key} was {was.get(key)!r}, is {now.get(key)!r}" for key in different)
            raise DataError(f"{path} holds the sizes of other preprocessing ({pairs}): {_CURE}")
        return np.array([json.loads(line) or [-1, -1, -1] for line in file], dtype=np.int64)


def sizes_in_training(sizes: np.ndarray, limit: LengthLimit | None = None) -> np.ndarray:
    """Sizes of what training reads, [n, 3]: of a sample that is replaced, those of its replacement.

    Args:
        sizes: [n, 3] as from `read_sizes`.
        limit: on the tokens of a sample. At a lower frame rate a sample is taken to be as long as it may be.
    """
    sizes, bad = sizes.copy(), sizes[:, 0] < 0
    if limit is not None:
        excess = np.where(bad, 0, np.maximum(sizes.sum(axis=1) - limit.max_tokens, 0))
        if limit.lower_fps:
            lowered = np.minimum(excess, sizes[:, 1])
            sizes[:, 1] -= lowered
            excess -= lowered
        bad |= excess > 0
    for index in np.flatnonzero(bad).tolist():
        others = (substitute(index, attempt, len(sizes)) for attempt in range(1, ATTEMPTS))
        good = next((other for other in others if not bad[other]), None)
        # Where nothing can be read, a length says nothing.
        sizes[index] = 0 if good is None else sizes[good]
    return sizes


def _hash(manifest: Path) -> str:
    with manifest.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
