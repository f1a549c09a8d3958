"""Shards of a feature cache: safetensors files that say what they hold.

The header of a shard names how its features were made, and the media files in it. So from the shards alone a cache that
was cut short is completed, by any number of processes. A shard gets its name when it is whole and on the disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omnisieve.data.errors import DataError
from omnisieve.files import publish

INDEX = "index.json"
VERSION = 2
# Written to by a run that is still going; what stands in them was never finished.
STAGING = ".run-"
_HEADER, _SCALE = "omnisieve", ".scale"
_INT8_MAX = 127
# Faults of a file that another run, or a machine with less to do, may not meet again.
_PASSING = ("timeout", "crashed", "memory")


class FeatureCacheError(DataError):
    """A cache that cannot serve; the message says what differs or what is missing, and the cure."""


@dataclass(frozen=True)
class Origin:
    """How the features of a cache came to be.

    Attributes:
        preprocessing: everything that decides them, JSON values; see `MediaLoader.preprocessing`.
        encoded: name of the dtype in which the encoders gave them.
        stored: name of the dtype on the disk: "bfloat16", "float32", or "int8" with a float32 scale for each token.
    """

    preprocessing: Mapping[str, Any]
    encoded: str
    stored: str

    @property
    def rounding(self) -> str | None:
        """The dtype that features were rounded to; None if they are, bit for bit, what the encoders gave."""
        exact = self.stored in (self.encoded, "float32")
        return None if exact else self.stored

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same to add to a cache, as JSON values."""
        return as_json({**self.preprocessing, "data.feature_cache_dtype": self.stored})

    def to_json(self) -> dict[str, Any]:
        """For headers and the index."""
        return {
            "version": VERSION,
            "preprocessing": as_json(self.preprocessing),
            "encoded": self.encoded,
            "stored": self.stored,
        }


def origin_of(values: Mapping[str, Any], place: Path) -> Origin:
    """What `Origin.to_json` gave.

    Raises:
        FeatureCacheError: another version wrote it.
    """
    if values.get("version") != VERSION:
        raise FeatureCacheError(f"{place} was written by another version of omnisieve; remove it and cache again")
    return Origin(values["preprocessing"], values["encoded"], values["stored"])


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they are after JSON, where a tuple is a list."""
    return json.loads(json.dumps(dict(values)))


def check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Compare settings; both are JSON values.

    Raises:
        FeatureCacheError: names those that differ.
    """
    different = sorted(key for key in wanted.keys() | stored.keys() if wanted.get(key) != stored.get(key))
    if different:
        pairs = "; ".join(f"{key}: cached {stored.get(key)!r}, asked {wanted.get(key)!r}" for key in different)
        raise FeatureCacheError(
            f"{folder} was made with other settings ({pairs}); use the same settings, or another folder for these"
        )


@dataclass
class Contents:
    """What shards hold together.

    Attributes:
        shards: their file names.
        entries: by media key: "file", "kind", "run", "features" (names of all features of the medium) and "tensors",
            the place in `shards` of each array that is there.
        unreadable: by media key, stream, kind and reason of the `MediaError`.
    """

    shards: list[str] = field(default_factory=list)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    unreadable: dict[str, list[str]] = field(default_factory=dict)

    def add(self, shard: str, header: Mapping[str, Any]) -> None:
        """Add what a shard's header names."""
        place = len(self.shards)
        self.shards.append(shard)
        for key, entry in header["entries"].items():
            known = self.entries.setdefault(key, {**entry, "tensors": {}})
            known["tensors"].update(dict.fromkeys(entry["tensors"], place))
        self.unreadable.update(header["unreadable"])

    def missing(self, key: str, statistics: Sequence[str]) -> set[str] | None:
        """Arrays that a medium lacks; None: all of them, because it is not known at all.

        Args:
            key: of the medium.
            statistics: that it shall have, as far as it has tokens of their modality.
        """
        if key not in self.entries:
            return None
        entry = self.entries[key]
        wanted = {*entry["features"], *(name for name in statistics if name.split("/")[0] in entry["features"])}
        return wanted - entry["tensors"].keys()

    def fault(self, key: str) -> list[str] | None:
        """Why a file could not be read and need not be tried again."""
        fault = self.unreadable.get(key)
        return None if fault is None or key in self.entries or fault[1] in _PASSING else fault


def scan(folder: Path, origin: Origin) -> tuple[Contents, list[Path]]:
    """Look into all shards of a folder; only headers are read, and compared with the files' lengths.

    Returns:
        what is there; and the shards that are torn.

    Raises:
        FeatureCacheError: a shard was made with other settings; names them.
    """
    contents, torn = Contents(), []
    for path in sorted(folder.glob("*.safetensors")):
        header = read_header(path)
        if header is None:
            torn.append(path)
            continue
        check_same(origin_of(header, folder).settings, origin.settings, folder)
        contents.add(path.name, header)
    return contents, torn


def read_header(path: Path) -> dict[str, Any] | None:
    """What a shard says of itself; None if it is torn: cut short, or not written to the end.

    Raises:
        FeatureCacheError: it is whole, but another version wrote it.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            metadata = shard.metadata()
    except SafetensorError:
        return None
    return json.loads((metadata or {}).get(_HEADER, "{}"))


def write_shard(staging: Path, target: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a shard under a passing name, then give it its own.

    Raises:
        FeatureCacheError: the disk is full, or refuses.
    """
    temporary = staging / target.name
    with _writing(target):
        save_file(dict(tensors), temporary, metadata={_HEADER: json.dumps(header)})
        # Later versions of safetensors make files that only their owner can read; a folder has the user's own rule.
        temporary.chmod(staging.stat().st_mode & 0o666)
        publish(temporary, target)


def write_index(folder: Path, staging: Path, origin: Origin, contents: Contents) -> None:
    """Make what shards hold readable: media with all of their features, and those that cannot be read."""
    whole = {key: entry for key, entry in contents.entries.items() if not contents.missing(key, ())}
    unreadable = {key: fault for key, fault in contents.unreadable.items() if key not in whole}
    index = {**origin.to_json(), "shards": contents.shards, "entries": whole, "unreadable": unreadable}
    temporary = staging / INDEX
    with _writing(folder / INDEX):
        temporary.write_text(json.dumps(index), encoding="utf-8")
        publish(temporary, folder / INDEX)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(target.parent).free / 2**20
        raise FeatureCacheError(
            f"cannot write {target}: {error} ({free:.0f} MiB are free there). Finished shards stay: make room, check "
            "quota and permissions, and start again to go on"
        ) from error


def pack(name: str, values: Tensor, stored: str) -> dict[str, Tensor]:
    """An array [N, ...] as it is stored.

    Args:
        name: of the array.
        values: features [N, D], on any device.
        stored: a dtype's name; of int8, a second array holds a scale for each row.
    """
    if stored != "int8":
        return {name: values.detach().to("cpu", getattr(torch, stored)).contiguous()}
    rounded, scale = quantise(values.detach())
    return {name: rounded.cpu().contiguous(), f"{name}{_SCALE}": scale.cpu().contiguous()}


def unpack(shard: Any, name: str, dtype: torch.dtype) -> Tensor:
    """An array of an open shard; what was stored as int8 comes in `dtype`."""
    values = shard.get_tensor(name)
    return dequantise(values, shard.get_tensor(f"{name}{_SCALE}"), dtype) if values.dtype == torch.int8 else values


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows [N, D] to int8, symmetrically: the largest magnitude of a row becomes 127.

    Returns:
        int8 [N, D] and scales [N, 1] float32. A row with a value that is not finite has a scale that is not, and comes
        back as NaN: a step that uses it is refused as it would be online.
    """
    wide = values.float()
    scale = wide.abs().amax(dim=-1, keepdim=True) / _INT8_MAX
    # A row of zeros divides by zero.
    return (wide / scale).nan_to_num(0.0, 0.0, 0.0).round().to(torch.int8), scale


def dequantise(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [N, D] of `quantise`, each value wrong by at most half its row's scale."""
    return (values.float() * scale).to(dtype)


def stored_bytes(rows: int, width: int, stored: str) -> int:
    """Size of so many feature rows on the disk."""
    return rows * (width + 4) if stored == "int8" else rows * width * getattr(torch, stored).itemsize


def remove_remains(folder: Path) -> None:
    """Remove what runs that were killed left unfinished; no other run may be writing there."""
    for remains in folder.glob(f"{STAGING}*"):
        shutil.rmtree(remains)


def staging_folder(folder: Path, run: str) -> Path:
    """Where the processes of a run write what is not finished; made if it is not there.

    Raises:
        FeatureCacheError: the folder cannot be written to.
    """
    staging = folder / f"{STAGING}{run}"
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FeatureCacheError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    return staging
