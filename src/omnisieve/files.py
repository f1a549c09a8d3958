"""Files that must survive a crash: hashes, what is on the disk for certain, and writing over nothing but our own.

What is not finished lies in hidden folders `.NAME.XXXX.partial` beside its place. An older version that makes room lies
in `.NAME.old` for a moment; if a kill leaves it there, the next writer takes it up.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
Ours = Callable[[Path], bool]
"""Whether an existing file is an older version of what is written: of a folder, by its path in it; else by its path."""


class NotOursError(FileExistsError):
    """Something else stands where a file is to be written; the message names it."""


def sha256(path: Path) -> str:
    """Hash of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk and not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, target: Path) -> None:
    """Give a finished file its name, in the same file system: after a crash it is there whole, or not at all."""
    flush(temporary)
    temporary.replace(target)
    flush(target.parent)


@contextmanager
def replacing(target: Path, ours: Ours) -> Iterator[Path]:
    """Write a file or a folder: all of it or nothing, and over nothing that is not ours.

    What belongs to an older version goes with it; whatever else lies in a folder stays, and so does all of it if the
    block raises.

    Args:
        target: of the file or folder; behind a link, what the link leads to. Folders above it are made.
        ours: see `Ours`.

    Yields:
        a place in the same file system, to make the file or folder at.

    Raises:
        NotOursError: a file that is not ours has the name of one that is written.
        OSError: the file system refuses.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PARTIAL, dir=target.parent))
    try:
        staged = scratch / target.name
        yield staged
        for path in (*staged.rglob("*"), staged):
            flush(path)
        (_put_folder if staged.is_dir() else _put_file)(staged, target, ours)
        flush(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(target: Path, text: str, ours: Ours = lambda _: True) -> None:
    """Write a text file as `replacing` does; over any file unless told otherwise."""
    with replacing(target, ours) as staged:
        staged.write_text(text, encoding="utf-8")


def remove(folder: Path, ours: Ours) -> None:
    """Remove what is ours of a folder, and the folders that hold nothing else."""
    for path in [path for path in folder.rglob("*") if not _is_folder(path) and ours(path.relative_to(folder))]:
        path.unlink()
        for above in path.parents:
            if any(above.iterdir()):
                break
            above.rmdir()
            if above == folder:
                break


def clean_up(target: Path, ours: Ours) -> None:
    """Remove what a killed `replacing` left unfinished, and put back what it had moved; nobody else may be writing."""
    for remains in target.parent.glob(f".{target.name}.*{PARTIAL}"):
        shutil.rmtree(remains, ignore_errors=True)
    _take_up(target, ours)


def _put_file(staged: Path, target: Path, ours: Ours) -> None:
    if target.exists() and not (target.is_file() and ours(target)):
        raise NotOursError(f"{target} is there and was not written by this program; move it, or choose another name")
    staged.replace(target)


def _put_folder(staged: Path, target: Path, ours: Ours) -> None:
    _take_up(target, ours)
    if target.exists():
        written = [path.relative_to(staged) for path in staged.rglob("*") if not path.is_dir()]
        foreign = [target] if not target.is_dir() else [
            target / path for path in written if os.path.lexists(target / path) and not ours(path)
        ]  # fmt: skip
        if foreign:
            raise NotOursError(f"{foreign[0]} is there and was not written by this program; move it first")
        # Two renames: a kill between them leaves the old version under the other name.
        target.rename(_old(target))
    staged.rename(target)
    _take_up(target, ours)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _take_up(target: Path, ours: Ours) -> None:
    """Of an older version that made room: all of it if there is no newer one, else what is not ours."""
    old = _old(target)
    if not old.is_dir():
        return
    if not target.exists():
        old.rename(target)
        return
    remove(old, ours)
    _move_into(old, target)


def _move_into(old: Path, new: Path) -> None:
    """Move what has no counterpart in the other folder; what has one stays where it is, with its folders."""
    if not old.is_dir():
        return
    for path in old.iterdir():
        place = new / path.name
        if not os.path.lexists(place):
            path.rename(place)
        elif _is_folder(path) and _is_folder(place):
            _move_into(path, place)
    if not any(old.iterdir()):
        old.rmdir()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
