"""Where the entries of a data set come from.

| source | what it is |
|---|---|
| json | JSON lines, or a JSON file that holds a list |
| csv | a table with a header; commas, semicolons or tabs separate its columns, as they do in the header |
| folder | every media file in a folder and the folders in it; an entry has a path and nothing else |
| hf | a Hugging Face data set: a folder that `save_to_disk` wrote, a folder of data files, or a name on the hub |
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import Any

import datasets

from omnisieve.data.errors import DataError
from omnisieve.data.kinds import kind_of

SOURCES = ("json", "csv", "folder", "hf")
_SAVED = ("state.json", "dataset_dict.json")
_SUFFIXES = {
    "video": "mp4 m4v mkv webm mov avi flv wmv mpg mpeg ts mts m2ts vob ogv 3gp",
    "audio": "wav mp3 flac m4a m4b aac ogg oga opus wma aiff aif aifc mka amr ac3 au caf",
    "image": "png jpg jpeg jpe jfif webp bmp gif apng tif tiff avif jp2 pgm ppm",
}
_KIND_OF = {f".{suffix}": kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}


_DELIMITERS = (",", ";", "\t")


class _LongInteger(str):
    """Digits of an integer that is too long to be one; JSON has no limit."""

    __slots__ = ()


_JSON_NAMES: dict[type, str] = {
    list: "a list", str: "a text", _LongInteger: "a number", int: "a number", float: "a number",
    bool: "true or false", type(None): "null",
}  # fmt: skip
_MOST_DIGITS = 640
"""Of an integer: Python reads as many whatever its settings are."""
_LONGEST_FIELD = 2**31 - 1
"""In a table; the csv module stops at 131,072 characters by itself, and may not know larger numbers than this."""


class FormatError(DataError):
    """A data set, or one entry of it, that cannot be converted."""


@dataclass(frozen=True)
class Entry:
    """One entry of a source: `where` it stands, in words, and its `row`, or the `error` that there is instead."""

    where: str
    row: Mapping[str, Any]
    error: str | None = None


def source_of(path: str) -> str:
    """Which of `SOURCES` a path is.

    Raises:
        FormatError: nothing is there, or its suffix says nothing.
    """
    place = Path(path)
    if os.path.isdir(path):
        saved = any((place / name).is_file() for name in _SAVED)
        return "hf" if saved or any(place.rglob("*.parquet")) else "folder"
    if not os.path.isfile(path):
        raise FormatError(f"{path}: there is no such file or folder; for a name on the hub, add --format hf")
    source = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}.get(place.suffix.lower())
    if source is None:
        raise FormatError(f"{path}: the suffix {place.suffix!r} says nothing; add --format {'|'.join(SOURCES)}")
    return source


def read_entries(path: str, source: str, *, split: str | None = None, subset: str | None = None) -> Iterator[Entry]:
    """The entries of a data set, in order.

    Args:
        path: of a file or folder; for "hf" also a name.
        source: one of `SOURCES`.
        split, subset: of a Hugging Face data set.

    Raises:
        FormatError: the data set as a whole cannot be read.
    """
    try:
        if source == "hf":
            yield from _read_hf(path, split, subset)
        else:
            yield from {"json": _read_json, "csv": _read_csv, "folder": _read_folder}[source](Path(path))
    except FormatError:
        raise
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from error


def kind_of_entry(file: Any, root: Path) -> str:
    """ "video", "audio" or "image", by the content of a file, or of what a data set holds of it.

    Where that says nothing, by the suffix, and what is unknown counts as video: whoever decodes it says what is wrong.
    """
    content, path = (file.get("bytes"), file.get("path")) if isinstance(file, Mapping) else (None, file)
    kind = kind_of(content if isinstance(content, bytes) else root / str(path))
    return kind or _KIND_OF.get(Path(str(path)).suffix.lower(), "video")


def _read_json(path: Path) -> Iterator[Entry]:
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(4096).lstrip()[:1]
    if start == "[":
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"), parse_int=_integer)
        except (json.JSONDecodeError, RecursionError) as error:
            raise FormatError(f"{path}: no valid JSON ({error}); correct the file there") from error
        yield from (_entry(f"entry {number}", row) for number, row in enumerate(rows, 1))
    else:
        yield from _read_lines(path)


def _read_lines(path: Path) -> Iterator[Entry]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield _entry(f"line {number}", json.loads(line, parse_int=_integer))
            except (ValueError, RecursionError) as error:
                yield Entry(f"line {number}", {}, f"no valid JSON ({error})")


def _integer(digits: str) -> int | _LongInteger:
    return int(digits) if len(digits) <= _MOST_DIGITS else _LongInteger(digits)


def _entry(where: str, row: Any) -> Entry:
    if not isinstance(row, dict):
        return Entry(where, {}, f"a JSON object is needed, this is {_JSON_NAMES[type(row)]}")
    try:
        number = _long_integer(row)
    except RecursionError:
        return Entry(where, {}, "nested too deeply")
    return Entry(where, row, None if number is None else f"it holds an integer of {len(number)} digits; quote it")


def _long_integer(value: Any) -> _LongInteger | None:
    """The first such integer in a JSON value."""
    if isinstance(value, _LongInteger):
        return value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for item in items if (found := _long_integer(item)) is not None), None)


def _read_csv(path: Path) -> Iterator[Entry]:
    csv.field_size_limit(_LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        delimiter = _delimiter(file.readline(), "\t" if path.suffix.lower() == ".tsv" else ",")
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = next(reader, [])
        if not header or len(set(header)) < len(header):
            raise FormatError(f"{path}: the first line must name each column once, it has {header}")
        yield from _read_records(file, reader.line_num + 1, header, delimiter)


def _read_records(lines: Iterator[str], first: int, header: list[str], delimiter: str) -> Iterator[Entry]:
    """Rows of a table; a record may go over several lines, and is named by its first.

    A stray quotation mark swallows what is behind it: then the line is an error, and reading goes on with the next one.
    Where tabs separate columns, most programs write none that means anything.
    """
    again: deque[str] = deque()
    while True:
        taken: list[str] = []
        try:
            cells = next(csv.reader(_noted(again, lines, taken), delimiter=delimiter, strict=True), None)
            problem = None
        except csv.Error as error:
            cells, problem = [], f"a quotation mark is not in its place ({error}); write two of them inside a cell"
        if cells is None:
            return
        wrong = problem is not None or len(cells) not in (0, len(header))
        if wrong and delimiter == "\t":
            plain = next(csv.reader(taken[:1], delimiter=delimiter, quoting=csv.QUOTE_NONE))
            if len(plain) == len(header):
                cells, problem = plain, None
        if wrong and (problem is not None or delimiter == "\t"):
            again.extendleft(reversed(taken[1:]))
            del taken[1:]
        if problem is None and len(cells) not in (0, len(header)):
            problem = f"{len(cells)} cells, but the header has {len(header)} columns"
        if problem is not None:
            yield Entry(f"line {first}", {}, problem)
        elif cells:
            yield Entry(f"line {first}", dict(zip(header, cells, strict=True)))
        first += len(taken)


def _noted(again: deque[str], lines: Iterator[str], taken: list[str]) -> Iterator[str]:
    """Lines that are to be read again, and then the others; those that were read are noted."""
    while (line := again.popleft() if again else next(lines, None)) is not None:
        taken.append(line)
        yield line


def _delimiter(header: str, usual: str) -> str:
    """What separates most columns; the usual one if several do."""
    unquoted = re.sub('"[^"]*"', "", header)
    return max((usual, *_DELIMITERS), key=unquoted.count)


def _read_folder(folder: Path) -> Iterator[Entry]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and _is_medium(file))
    if not files:
        raise FormatError(f"{folder}: there is no media file, neither by its content nor by its suffix")
    for file in files:
        name = file.relative_to(folder).as_posix()
        yield Entry(f"file {name}", {"path": name})


def _is_medium(file: Path) -> bool:
    # A damaged one is known by its suffix.
    return file.suffix.lower() in _KIND_OF or kind_of(file) is not None


def _read_hf(path: str, split: str | None, subset: str | None) -> Iterator[Entry]:
    data: Any
    if any((Path(path) / name).is_file() for name in _SAVED):
        data = datasets.load_from_disk(path)
    else:  # as a stream: nothing is copied to the library's cache
        data = datasets.load_dataset(path, name=subset, streaming=True)
    if isinstance(data, Mapping):
        names = list(data)
        chosen = split if split is not None else names[0] if len(names) == 1 else None
        if chosen not in names:
            raise FormatError(f"{path} has the splits {', '.join(map(str, names))}; choose one with --split")
        data = data[chosen]
    return _read_rows(data)


def _read_rows(data: Any) -> Iterator[Entry]:
    number = 0
    # As Arrow tables: media columns stay paths and bytes, nothing is decoded.
    for table in data.with_format("arrow").iter(100):
        for row in table.to_pylist():
            number += 1
            yield Entry(f"row {number}", _with_dates(row))


def _with_dates(value: Any) -> Any:
    """Dates and times as ISO text."""
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, dict):
        return {key: _with_dates(item) for key, item in value.items()}
    return [_with_dates(item) for item in value] if isinstance(value, list) else value
