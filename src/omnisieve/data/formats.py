"""Data sets in other layouts, as lines of a manifest in messages form.

What an entry may be, by its keys:

| keys | form |
|---|---|
| `messages` | messages form already; only its paths change |
| `conversations` | ShareGPT, LLaVA, LLaVA-Video: turns of `from` and `value`; `video(s)`, `audio(s)`, `image(s)` |
| otherwise | a path, a question and perhaps an answer, in columns |

All other keys are kept, `id` among them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnisieve.data.manifest import KINDS, ManifestError, no_path, parse_line
from omnisieve.data.sources import Entry, FormatError, kind_of_entry

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip
_PATH_COLUMNS = ("path", "video", "video_path", "audio", "audio_path", "image", "image_path", "file_name")
# LLaVA's line breaks between a placeholder and the text separate the two and are part of neither.
_PLACEHOLDER = re.compile(r"\n*(<(?:video|audio|image)>)\n*")


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table.

    Attributes:
        path: of the media file; None: the first that exists of path, video, video_path, audio, ..., file_name.
        question, answer: of the texts; entries without such an answer column are unlabelled.
    """

    path: str | None = None
    question: str = "question"
    answer: str = "answer"


@dataclass(frozen=True)
class Skipped:
    """An entry that cannot be used: where it stands, its id if it has one, and why."""

    where: str
    id: str | None
    reason: str


class Converter:
    """Entries to lines of a manifest."""

    def __init__(
        self,
        out: Path,
        media_root: Path,
        *,
        columns: Columns | None = None,
        question: str | None = None,
        allow_missing: bool = False,
    ) -> None:
        """
        Args:
            out: the manifest to be; media paths are made relative to its folder.
            media_root: what relative paths of the source are relative to.
            columns: of a table.
            question: asked where an entry has none.
            allow_missing: take media files that are not there.
        """
        self._out = out
        self._folder = out.parent.resolve()
        self._root = media_root
        self._columns = columns or Columns()
        self._question = question
        self._allow_missing = allow_missing

    def convert(self, entry: Entry) -> str | Skipped:
        """One line of the manifest, without its end; or why there is none."""
        identity = str(entry.row["id"]) if entry.row.get("id") is not None else None
        try:
            if entry.error is not None:
                raise FormatError(entry.error)
            row = self._with_places(to_messages(entry.row, self._columns, self._question, self._root))
            if identity is None:
                row = {"id": entry.where.removeprefix("file "), **row}
            text = json.dumps(row, ensure_ascii=False)
            # What is written can be read: the manifest's own rules decide.
            conversation = parse_line(text, self._out, 0)
        except ManifestError as error:
            return Skipped(entry.where, identity, str(error).removeprefix(f"{self._out}, line 0, "))
        except (FormatError, TypeError) as error:
            return Skipped(entry.where, identity, str(error))
        paths = [] if self._allow_missing else [part.path for part in conversation.media]
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            return Skipped(entry.where, identity, f"{os.path.normpath(missing[0])}: there is no such file")
        return text

    def _with_places(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with paths relative to the manifest, in lists and in parts."""
        placed = dict(row)
        for kind in KINDS:
            if isinstance(row.get(f"{kind}s"), list):
                placed[f"{kind}s"] = [self._place(file) for file in row[f"{kind}s"]]
        if isinstance(row["messages"], list):
            placed["messages"] = [self._message(message) for message in row["messages"]]
        return placed

    def _message(self, message: Any) -> Any:
        if not isinstance(message, dict) or not isinstance(message.get("content"), list):
            return message
        return {**message, "content": [self._part(part) for part in message["content"]]}

    def _part(self, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        return {**part, kind: self._place(part[kind])} if kind in KINDS and kind in part else part

    def _place(self, file: Any) -> str:
        """A path relative to the manifest; files that a data set holds itself are written beside it.

        Raises:
            FormatError: it is neither.
        """
        if isinstance(file, Mapping) and file.get("bytes") is not None:
            return self._write(file["bytes"], file.get("path"))
        if isinstance(file, Mapping):
            file = file.get("path")
        if not isinstance(file, str) or not file:
            raise FormatError(f"a media file is {file!r}; the path of a file is needed")
        if (problem := no_path(file)) is not None:
            raise FormatError(f"a media file: {problem}")
        # Real folders, because `..` behind a symbolic link leads elsewhere; the file itself may be a link.
        path = self._root / file
        return os.path.relpath(path.parent.resolve() / path.name, self._folder)

    def _write(self, content: bytes, name: str | None) -> str:
        folder = f"{self._out.stem}_media"
        path = self._folder / folder / f"{hashlib.sha256(content).hexdigest()[:32]}{Path(name or '').suffix}"
        path.parent.mkdir(exist_ok=True)
        if not path.is_file():
            path.with_suffix(".tmp").write_bytes(content)
            path.with_suffix(".tmp").replace(path)
        return f"{folder}/{path.name}"


def to_messages(
    row: Mapping[str, Any], columns: Columns, question: str | None = None, root: Path = Path()
) -> dict[str, Any]:
    """A row of any form in messages form; see the module's table. Paths in it are relative to `root`.

    Raises:
        FormatError: it has none of the forms.
    """
    if row.get("messages") is not None:
        return dict(row)
    if row.get("conversations") is not None:
        return _from_sharegpt(row)
    return _from_table(row, columns, question, root)


def _from_sharegpt(row: Mapping[str, Any]) -> dict[str, Any]:
    """Turns with `from` and `value`.

    Without any placeholder the files go before the first question. LLaVA-Video writes `<image>` where its video goes.
    """
    files = {f"{kind}s": _files(row, kind) for kind in KINDS}
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise FormatError("'conversations' is no list of turns")
    messages = [_turn(turn, index) for index, turn in enumerate(turns)]
    if isinstance(row.get("system"), str) and row["system"]:
        messages.insert(0, {"role": "system", "content": row["system"]})
    asked = [message for message in messages if message["role"] == "user"]
    for message in asked:
        message["content"] = _PLACEHOLDER.sub(r"\1", message["content"])
        if files["videos"] and not files["images"]:
            message["content"] = message["content"].replace("<image>", "<video>")
    if asked and not any(_PLACEHOLDER.search(message["content"]) for message in asked):
        tags = "".join(f"<{kind}>" * len(files[f"{kind}s"]) for kind in KINDS)
        asked[0]["content"] = tags + asked[0]["content"]
    taken = {"conversations", "system", *KINDS, *files}
    rest = {key: value for key, value in row.items() if key not in taken}
    return {**rest, "messages": messages, **{name: values for name, values in files.items() if values}}


def _turn(turn: Any, index: int) -> dict[str, Any]:
    where = f"conversations[{index}]"
    if not isinstance(turn, Mapping):
        raise FormatError(f"{where} is no object with 'from' and 'value'")
    role = _ROLES.get(str(turn.get("from")))
    if role is None:
        raise FormatError(f"{where}.from is {turn.get('from')!r}; one of {', '.join(_ROLES)} is needed")
    if not isinstance(turn.get("value"), str):
        raise FormatError(f"{where}.value: a string is needed")
    return {**{k: v for k, v in turn.items() if k not in ("from", "value")}, "role": role, "content": turn["value"]}


def _files(row: Mapping[str, Any], kind: str) -> list[Any]:
    """Files of one kind: KIND or KINDs, one or a list."""
    if row.get(kind) is not None and row.get(f"{kind}s") is not None:
        raise FormatError(f"both {kind!r} and '{kind}s' are given; keep one")
    value = row.get(kind) if row.get(kind) is not None else row.get(f"{kind}s")
    return [] if value is None or value == "" else list(value) if isinstance(value, list) else [value]


def _from_table(row: Mapping[str, Any], columns: Columns, question: str | None, root: Path) -> dict[str, Any]:
    name = columns.path or next((name for name in _PATH_COLUMNS if row.get(name)), "path")
    if not row.get(name):
        raise FormatError(f"no path: the columns are {', '.join(map(repr, row))}; name one with --columns path=NAME")
    asked = row.get(columns.question) or question
    if not isinstance(asked, str):
        raise FormatError(
            f"no question in column {columns.question!r}; name another with --columns question=NAME, or add --question"
        )
    file = row[name]
    kind = next((kind for kind in KINDS if name.startswith(kind)), "video")
    if kind == "video":  # as such columns are named whatever is in them
        kind = kind_of_entry(file, root)
    messages = [{"role": "user", "content": [{"type": kind, kind: file}, {"type": "text", "text": asked}]}]
    if columns.answer in row:
        answer = row[columns.answer]
        if answer is None or answer == "":
            raise FormatError(f"the answer, column {columns.answer!r}, is empty")
        messages.append({"role": "assistant", "content": str(answer)})
    taken = {name, columns.question, columns.answer}
    return {**{key: value for key, value in row.items() if key not in taken}, "messages": messages}
