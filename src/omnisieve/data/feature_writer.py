"""Writing a feature cache: by any number of processes, each into its own shards, cut short and gone on with at will."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from omnisieve.data.batch import Features
from omnisieve.data.feature_shards import (
    FeatureCacheError,
    Origin,
    pack,
    read_header,
    scan,
    staging_folder,
    write_index,
    write_shard,
)
from omnisieve.data.manifest import MediaPart
from omnisieve.data.media import MediaError
from omnisieve.data.tokens import AudioRun, Run, VideoRun

_MODALITIES = ("video", "audio", "image")


class FeatureCacheWriter:
    """Adds to a cache, as one of the processes of a run. What is there already is kept.

    Attributes:
        contents: what finished shards held when this was made.
        staging: folder of what this run has not finished yet.
    """

    def __init__(
        self,
        folder: str | Path,
        origin: Origin,
        *,
        statistics: Sequence[str] = (),
        run: str | None = None,
        rank: int = 0,
        shard_bytes: int = 1 << 30,
    ) -> None:
        """
        Args:
            folder: of the cache: new, empty, finished or cut short.
            origin: how the features are made and stored.
            statistics: names of the extra arrays that every entry with tokens of their modality shall hold; they keep
                their dtype.
            run: a name that the processes of a run share, and no other run ever had; made up when None.
            rank: of this process in the run.
            shard_bytes: a shard is written when it has grown to this size; a kill costs each process at most so much.

        Raises:
            FeatureCacheError: the folder holds a cache that was made with other settings; names them.
        """
        self.folder = Path(folder)
        self.contents, self._torn = scan(self.folder, origin)
        self._origin, self._statistics, self._shard_bytes = origin, sorted(statistics), shard_bytes
        run = run or uuid.uuid4().hex[:12]
        self.staging = staging_folder(self.folder, run)
        self._names = f"features-{run}-{rank:04d}"
        self._written: list[str] = []
        self._added: set[str] = set()
        self._start_shard()

    def _start_shard(self) -> None:
        self._pending: dict[str, Tensor] = {}
        self._header: dict[str, dict[str, Any]] = {"entries": {}, "unreadable": {}}

    def lacks(self, key: str) -> bool:
        """Whether a medium must be encoded: it is not here yet, or not with all statistics."""
        return key not in self._added and self.contents.missing(key, self._statistics) != set()

    def add(self, part: MediaPart, key: str, run: Run, features: Features) -> None:
        """Keep what the cache lacks of one medium.

        Args:
            part: the medium. key: its own, see `media_key`.
            run: its size in tokens.
            features: [tokens, D] of each modality it has, and extras of as many rows.

        Raises:
            FeatureCacheError: the rows of sound, or of an extra array, are not those of the tokens; the disk refuses.
        """
        rows = {name: getattr(features, name) for name in _MODALITIES}
        arrays = {name: values for name, values in rows.items() if values is not None} | dict(features.extra)
        _check_rows(part, run, arrays)
        missing = self.contents.missing(key, self._statistics)
        kept = sorted(arrays if missing is None else missing & arrays.keys())
        for name in kept:
            stored = str(arrays[name].dtype).removeprefix("torch.") if name in self._statistics else self._origin.stored
            self._pending.update(pack(f"{key}/{name}", arrays[name], stored))
        self._added.add(key)
        self._header["entries"][key] = {
            "file": part.path.name,
            "kind": part.kind,
            "run": asdict(run),
            "features": sorted(arrays.keys() - set(self._statistics)),
            "tensors": kept,
        }
        if sum(tensor.nbytes for tensor in self._pending.values()) >= self._shard_bytes:
            self._flush()

    def leave_out(self, key: str, error: MediaError) -> None:
        """Remember that a file cannot be read, so that reading it from the cache fails as decoding it did."""
        fault = [error.stream, error.kind, error.reason]
        if self.contents.unreadable.get(key) != fault:
            self._header["unreadable"][key] = fault

    def _flush(self) -> None:
        if not (self._header["entries"] or self._header["unreadable"]):
            return
        name = f"{self._names}-{len(self._written):05d}.safetensors"
        write_shard(self.staging, self.folder / name, self._pending, {**self._origin.to_json(), **self._header})
        self._written.append(name)
        self._start_shard()

    def close(self) -> list[str]:
        """Write what is left; returns the names of all shards that this process wrote."""
        self._flush()
        return self._written

    def finish(self, shards: Sequence[str]) -> None:
        """Make the cache readable, when all processes of the run have closed; one of them does it.

        Args:
            shards: that the processes wrote.

        Raises:
            FeatureCacheError: one of them is not there, or the disk refuses.
        """
        # A process that began earlier may have written some before this one looked.
        for name in sorted(set(shards) - set(self.contents.shards)):
            header = read_header(self.folder / name)
            if header is None:
                raise FeatureCacheError(f"{self.folder / name} was damaged while the run went on; run it again")
            self.contents.add(name, header)
        write_index(self.folder, self.staging, self._origin, self.contents)
        for path in self._torn:
            path.unlink()
        shutil.rmtree(self.staging)


def _check_rows(part: MediaPart, run: Run, arrays: Mapping[str, Tensor]) -> None:
    sound = run.audio_tokens if isinstance(run, VideoRun) else run.tokens if isinstance(run, AudioRun) else 0
    rows = {name: len(arrays[name]) for name in _MODALITIES if name in arrays}
    if rows.get("audio", 0) != sound:
        raise FeatureCacheError(f"{part.path}: {rows.get('audio', 0)} audio features for {sound} audio tokens")
    for name, value in arrays.items():
        modality = name.split("/")[0]
        if len(value) != rows.get(modality):
            raise FeatureCacheError(f"{part.path}: {len(value)} rows of {name!r} for {rows.get(modality)} tokens")
