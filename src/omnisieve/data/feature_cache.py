"""Outputs of frozen encoders kept on disk, so that an epoch neither decodes nor encodes.

A cache is a folder of shards and an `index.json`. An entry is one media file: its key is the hash of the file's
content plus how densely this one was sampled, so a renamed file is still found and a changed one is not. The cache as a
whole belongs to one way of preprocessing and one set of encoder weights; opened for another, it refuses.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from omnisieve.data.batch import Features
from omnisieve.data.feature_shards import INDEX, FeatureCacheError, as_json, check_same, origin_of, unpack
from omnisieve.data.manifest import MediaPart
from omnisieve.data.media import MediaError, check_file
from omnisieve.data.tokens import AudioRun, ImageRun, Run, VideoRun

_RUNS: dict[str, type] = {"video": VideoRun, "audio": AudioRun, "image": ImageRun}


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
    track = "" if part.audio_track is None else f"-track{part.audio_track}"
    return f"{part.kind}-{content}{sampling}{track}"


@lru_cache(maxsize=100_000)
def _content_hash(path: str, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file, kept for as long as its size and time of change stay (those two are only the memory's key)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]


class FeatureCache:
    """Reads a cache, memory-mapped; safe to hand to `DataLoader` workers.

    Attributes:
        folder: of the cache.
        rounding: the dtype that features were rounded to; None if they are, bit for bit, what the encoders gave.
    """

    def __init__(self, folder: str | Path, preprocessing: Mapping[str, Any]) -> None:
        """
        Args:
            folder: of a finished cache; how it stores features is said there.
            preprocessing: what the run would do without the cache.

        Raises:
            FeatureCacheError: no finished cache is there, or it was made with other preprocessing.
        """
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise FeatureCacheError(f"{folder} holds no finished feature cache; make one with tools/cache_features.py")
        index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        origin = origin_of(index, self.folder)
        check_same(as_json(origin.preprocessing), as_json(preprocessing), self.folder)
        self.rounding = origin.rounding
        self._encoded: torch.dtype = getattr(torch, origin.encoded)
        self._shards: list[str] = index["shards"]
        self._entries: dict[str, dict[str, Any]] = index["entries"]
        self._unreadable: dict[str, list[str]] = index["unreadable"]
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, part: MediaPart) -> bool:
        return media_key(part) in self._entries

    def read(self, part: MediaPart) -> CachedMedium:
        """One medium's features; those stored as int8 in the dtype that the encoders gave.

        Raises:
            MediaError: the file could not be read when the cache was made, or is gone.
            FeatureCacheError: the file is not in the cache, or the cache is damaged.
        """
        key = media_key(part)
        if key in self._unreadable:
            raise MediaError(str(part.path), *self._unreadable[key])
        if key not in self._entries:
            raise FeatureCacheError(
                f"{part.path} is not in the feature cache {self.folder} ({len(self)} files), or was changed since; "
                "run tools/cache_features.py with this configuration again, which adds what is missing, or read the "
                "files themselves with data.feature_cache=null"
            )
        entry = self._entries[key]
        places = entry["tensors"].items()
        tensors = {name: unpack(self._shard(place), f"{key}/{name}", self._encoded) for name, place in places}
        rows = {name: tensors.pop(name, None) for name in _RUNS}
        run = entry["run"]
        if "grid" in run:
            run = {**run, "grid": tuple(run["grid"])}
        return CachedMedium(_RUNS[entry["kind"]](**run), Features(**rows, extra=tensors))

    def _shard(self, place: int) -> Any:
        if place not in self._open:
            path = self.folder / self._shards[place]
            try:
                self._open[place] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise FeatureCacheError(
                    f"{path} is damaged or gone ({error}); tools/cache_features.py encodes again what was in it"
                ) from error
        return self._open[place]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}
