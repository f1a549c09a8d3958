"""Outputs of frozen encoders kept on disk, so that an epoch neither decodes nor encodes.

A cache is a folder of safetensors shards and an `index.json`. An entry is one media file: its key is the hash of the
file's content plus how densely this one was sampled, so a renamed file is still found and a changed one is not. The
cache as a whole belongs to one way of preprocessing and one set of encoder weights; opened for another, it refuses.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from omnisieve.data.batch import Features
from omnisieve.data.errors import DataError
from omnisieve.data.manifest import MediaPart
from omnisieve.data.media import MediaError, check_file
from omnisieve.data.tokens import AudioRun, ImageRun, Run, VideoRun

INDEX = "index.json"
_RUNS: dict[str, type] = {"video": VideoRun, "audio": AudioRun, "image": ImageRun}


class FeatureCacheError(DataError):
    """A cache that cannot serve; the message says what differs or what is missing, and the cure."""


@dataclass(frozen=True)
class CachedMedium:
    """One media file's encoder outputs: `run` is its size in tokens, `features` their rows."""

    run: Run
    features: Features


def media_key(part: MediaPart) -> str:
    """Hash of a file's content and of what its manifest line says about sampling it.

    Raises:
        MediaError: there is no such file, or it is empty.
    """
    check_file(part.path)
    stat = os.stat(part.path)
    content = _content_hash(str(part.path), stat.st_size, stat.st_mtime_ns)
    sampling = "" if part.fps is None and part.max_frames is None else f"-{part.fps}-{part.max_frames}"
    return f"{part.kind}-{content}{sampling}"


@lru_cache(maxsize=100_000)
def _content_hash(path: str, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file, kept for as long as its size and time of change stay (those two are only the memory's key)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]


class FeatureCacheWriter:
    """Writes a cache; nothing can be read before `close`, which leaving the `with` block calls."""

    def __init__(
        self,
        folder: str | Path,
        preprocessing: Mapping[str, Any],
        *,
        statistics: Sequence[str] = (),
        dtype: torch.dtype = torch.bfloat16,
        shard_bytes: int = 1 << 30,
    ) -> None:
        """
        Args:
            folder: new or empty.
            preprocessing: everything that decides the features, see `MediaLoader.preprocessing`; JSON values.
            statistics: names of the extra arrays that every entry with tokens of their modality holds.
            dtype: of stored features; extra arrays keep their own.
            shard_bytes: a shard is written when it has grown to this size.

        Raises:
            FeatureCacheError: the folder already holds a cache.
        """
        self.folder = Path(folder)
        if (self.folder / INDEX).exists():
            raise FeatureCacheError(f"{folder} already holds a feature cache; remove it or choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.preprocessing, self.statistics = dict(preprocessing), sorted(statistics)
        self.dtype, self.shard_bytes = dtype, shard_bytes
        self._entries: dict[str, dict[str, Any]] = {}
        self._unreadable: dict[str, list[str]] = {}
        self._pending: dict[str, Tensor] = {}
        self._shards = 0

    def __enter__(self) -> FeatureCacheWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.close()

    def __contains__(self, part: MediaPart) -> bool:
        return media_key(part) in self._entries

    def add(self, part: MediaPart, run: Run, features: Features) -> None:
        """Keep one medium's features: [tokens, D] of each modality it has, and extras of as many rows.

        Raises:
            FeatureCacheError: the rows of sound, or of an extra array, are not those of the tokens.
        """
        key = media_key(part)
        if key in self._entries:
            return
        present = {"video": features.video, "audio": features.audio, "image": features.image}
        tensors = {name: value.to(self.dtype) for name, value in present.items() if value is not None}
        tensors.update(features.extra)
        _check_rows(part, run, tensors)
        for name, value in tensors.items():
            self._pending[f"{key}/{name}"] = value.detach().cpu().contiguous()
        self._entries[key] = {
            "file": part.path.name,
            "shard": self._shards,
            "kind": part.kind,
            "run": asdict(run),
            "tensors": sorted(tensors),
        }
        if sum(tensor.nbytes for tensor in self._pending.values()) >= self.shard_bytes:
            self._flush()

    def leave_out(self, part: MediaPart, error: MediaError) -> None:
        """Remember that a file cannot be read, so that reading it from the cache fails as decoding it did."""
        # A file that is missing or empty needs no entry: looking it up says so.
        if error.kind not in ("missing", "empty"):
            self._unreadable[media_key(part)] = [error.stream, error.kind, error.reason]

    def close(self) -> None:
        """Write what is left, then the index."""
        self._flush()
        index = {
            "version": 1,
            "preprocessing": self.preprocessing,
            "statistics": self.statistics,
            "entries": self._entries,
            "unreadable": self._unreadable,
        }
        temporary = self.folder / f"{INDEX}.tmp"
        temporary.write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
        temporary.replace(self.folder / INDEX)

    def _flush(self) -> None:
        if not self._pending:
            return
        path = _shard(self.folder, self._shards)
        save_file(self._pending, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        self._pending = {}
        self._shards += 1


class FeatureCache:
    """Reads a cache, memory-mapped; safe to hand to `DataLoader` workers.

    Attributes:
        folder: of the cache.
        statistics: names of the extra arrays that it holds.
    """

    def __init__(self, folder: str | Path, preprocessing: Mapping[str, Any]) -> None:
        """
        Args:
            folder: of a finished cache.
            preprocessing: what the run would do without the cache.

        Raises:
            FeatureCacheError: no finished cache is there, or it was made with other preprocessing.
        """
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise FeatureCacheError(f"{folder} holds no finished feature cache; make one with tools/cache_features.py")
        index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(dict(preprocessing)))
        stored = index["preprocessing"]
        different = sorted(key for key in wanted.keys() | stored.keys() if wanted.get(key) != stored.get(key))
        if different:
            pairs = "; ".join(f"{k}: cached {stored.get(k)!r}, asked {wanted.get(k)!r}" for k in different)
            raise FeatureCacheError(
                f"{folder} was made with other preprocessing ({pairs}); use the same settings or cache again"
            )
        self.statistics: list[str] = index.get("statistics", [])
        self._entries: dict[str, dict[str, Any]] = index["entries"]
        self._unreadable: dict[str, list[str]] = index.get("unreadable", {})
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, part: MediaPart) -> bool:
        return media_key(part) in self._entries

    def covers(self, part: MediaPart) -> bool:
        """Whether caching again could not add this file: it is here, or it cannot be read."""
        try:
            return media_key(part) in self._entries.keys() | self._unreadable.keys()
        except MediaError:
            return True

    def read(self, part: MediaPart) -> CachedMedium:
        """One medium's features.

        Raises:
            MediaError: the file could not be read when the cache was made, or is gone.
            FeatureCacheError: the file is not in the cache.
        """
        key = media_key(part)
        if key in self._unreadable:
            raise MediaError(str(part.path), *self._unreadable[key])
        if key not in self._entries:
            raise FeatureCacheError(
                f"{part.path} is not in the feature cache {self.folder} ({len(self)} files), or was changed since; "
                "cache the manifest again with tools/cache_features.py"
            )
        entry = self._entries[key]
        shard = self._shard(entry["shard"])
        tensors = {name: shard.get_tensor(f"{key}/{name}") for name in entry["tensors"]}
        rows = {name: tensors.pop(name, None) for name in _RUNS}
        run = entry["run"]
        if "grid" in run:
            run = {**run, "grid": tuple(run["grid"])}
        return CachedMedium(_RUNS[entry["kind"]](**run), Features(**rows, extra=tensors))

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            self._open[number] = safe_open(_shard(self.folder, number), framework="pt")
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def _check_rows(part: MediaPart, run: Run, tensors: Mapping[str, Tensor]) -> None:
    sound = run.audio_tokens if isinstance(run, VideoRun) else run.tokens if isinstance(run, AudioRun) else 0
    rows = {name: len(tensors[name]) for name in _RUNS if name in tensors}
    if rows.get("audio", 0) != sound:
        raise FeatureCacheError(f"{part.path}: {rows.get('audio', 0)} audio features for {sound} audio tokens")
    for name, value in tensors.items():
        modality = name.split("/")[0]
        if len(value) != rows.get(modality):
            raise FeatureCacheError(f"{part.path}: {len(value)} rows of {name!r} for {rows.get(modality)} tokens")


def _shard(folder: Path, number: int) -> Path:
    return folder / f"features-{number:05d}.safetensors"
