"""JSONL manifests in `messages` form.

One line is one conversation:

    {"id": "clip-7",
     "messages": [
       {"role": "user", "content": [{"type": "video", "video": "clips/7.mp4", "fps": 2, "max_frames": 128},
                                    {"type": "text", "text": "What is said?"}], "family": "speech"},
       {"role": "assistant", "content": "hello"}]}

or with tags in a string: `"content": "<video>What is said?"` beside `"videos": ["clips/7.mp4"]`, likewise `<image>`
with `images` and `<audio>` with `audios`; a tag takes the next file of its list. Paths are relative to the
manifest's folder. Every other key, of the line or of a message, is kept; one that is null counts as absent. Whether a
video has sound is read from the file, never from the manifest. Other layouts are converted, see `formats`.

`id` defaults to the line's number, and one that an earlier line has gets its line behind it: "clip-7 (line 12)". Two
more keys mean what they do in ms-swift: `system` of a line is a system message before all others, and `"loss": false`
of an assistant message keeps training from learning it.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from omnisieve.data.errors import DataError

KINDS = ("video", "audio", "image")
ROLES = ("system", "user", "assistant")
# Missing files that a message names.
_NAMED = 3
_TAG = re.compile(r"<(video|audio|image)>")
_SAMPLING: dict[str, Any] = {"fps": (int, float), "max_frames": (int,)}


class ManifestError(DataError):
    """A manifest that cannot be used; the message names file, line, key and cure."""


@dataclass(frozen=True)
class MediaPart:
    """One medium of a conversation: `kind` "video", "audio" or "image", and how densely to sample a video.

    `max_pixels` of a frame is set where a video is read more thinly for a limit on tokens: under a cap on the whole
    video, fewer frames would be larger. A manifest does not give it.
    """

    kind: str
    path: Path
    fps: float | None = None
    max_frames: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True)
class Conversation:
    """One line of a manifest.

    Attributes:
        id: its own, or made of the line's number; no two of a manifest are the same.
        messages: {"role", "content", ...}; content is a string or parts {"type": "text", "text"} / {"type": KIND}.
        media: in the order of their parts.
        meta: the line's other keys.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    media: tuple[MediaPart, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def alone(part: MediaPart) -> Conversation:
        """Nothing but one medium, for encoding it by itself."""
        return Conversation(str(part.path), ({"role": "user", "content": [{"type": part.kind}]},), (part,))

    def questions(self) -> Iterator[Conversation]:
        """Each question on its own: the media and system turns, one user turn, and nothing before it.

        The question's text and answer, its turn's number and its message's other keys join `meta` (`question`,
        `answer`, `turn`). Media parts of earlier turns move to the front of the question.
        """
        system = [m for m in self.messages if m["role"] == "system"]
        seen: list[Mapping[str, Any]] = []
        turn = 0
        for index, message in enumerate(self.messages):
            if message["role"] != "user":
                continue
            parts = _parts(message["content"])
            seen += [part for part in parts if part["type"] != "text"]
            texts = [part for part in parts if part["type"] == "text"]
            if index + 1 == len(self.messages) or self.messages[index + 1]["role"] != "assistant":
                continue
            meta = {
                **self.meta,
                **{key: value for key, value in message.items() if key not in ("role", "content")},
                "question": "".join(part["text"] for part in texts),
                "answer": _text(self.messages[index + 1]["content"]),
                "turn": turn,
            }
            asked = {"role": "user", "content": [*seen, *texts]}
            yield replace(self, messages=(*system, asked), media=self.media[: len(seen)], meta=meta)
            turn += 1


class Manifest(Sequence[Conversation]):
    """A manifest file. Lines live in one Arrow column, which forked workers share; each is parsed when read."""

    def __init__(self, path: str | Path) -> None:
        """
        Args:
            path: JSON lines; empty lines are skipped.

        Raises:
            ManifestError: the file is missing, is not UTF-8 or has no lines. A wrong line is reported when it is
                read, or by `check`, which also looks for the media files.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise ManifestError(f"{path}: there is no such manifest; give the path of a JSONL file")
        try:
            with self.path.open(encoding="utf-8") as file:
                # Files that were joined have byte-order marks within.
                lines = [(number, line.lstrip("\ufeff")) for number, line in enumerate(file, 1)]
                lines = [(number, line) for number, line in lines if line.strip()]
        except UnicodeDecodeError as error:
            raise ManifestError(f"{path}: the manifest is not UTF-8 ({error}); save it as such") from error
        if not lines:
            raise ManifestError(f"{path}: the manifest has no lines")
        # As text: typed columns would force one schema on contents that are strings here and lists there. From
        # memory: `load_dataset` would write a second copy to disk and count the call on a server.
        numbers, texts = zip(*lines, strict=True)
        self._table = datasets.Dataset.from_dict({"line": numbers, "text": texts, "id": _ids(numbers, texts)})

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        """The conversation at `index` (or those of a slice); raises `ManifestError` for a wrong line."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._table[int(index)]
        return replace(parse_line(row["text"], self.path, row["line"]), id=row["id"])

    def check(self, limit: int | None = None) -> None:
        """Read the first `limit` lines, or all, and look for their media files.

        Raises:
            ManifestError: at the first wrong line; or, naming some of them, because files are missing.
        """
        first_lines: dict[Path, int] = {}
        for row in islice(self._table, limit):
            for part in parse_line(row["text"], self.path, row["line"]).media:
                first_lines.setdefault(part.path, row["line"])
        missing = [f"line {line}: {path}" for path, line in first_lines.items() if not path.is_file()]
        if missing:
            more = f"; and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise ManifestError(
                f"{self.path}: {len(missing)} of {len(first_lines)} media files are missing: "
                f"{'; '.join(missing[:_NAMED])}{more}. Correct the paths (they are relative to {self.path.parent}), "
                "copy the files there, or take the lines out"
            )


def is_manifest(path: str | Path) -> bool:
    """Whether a file is a manifest by its first line, or empty."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            first = file.readline()
        row = json.loads(first) if first else {"messages": []}
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "messages" in row


def _ids(lines: Sequence[int], texts: Sequence[str]) -> list[str]:
    """An id for each line that is the same whenever the file is read, and no other line's."""
    own = [_own_id(text) for text in texts]
    taken = {name for name in own if name is not None}
    first: set[str] = set()
    ids = []
    for line, name in zip(lines, own, strict=True):
        chosen = str(line) if name is None else name
        if chosen in (taken if name is None else first):
            chosen = f"{chosen} (line {line})"
            while chosen in taken:
                chosen += "'"
            taken.add(chosen)
        first.add(chosen)
        ids.append(chosen)
    return ids


def _own_id(text: str) -> str | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None  # said when the line is read
    name = row.get("id") if isinstance(row, dict) else None
    # Half a character would break the column; it is said when the line is read.
    return None if is_absent(name) or name == "" else str(name).encode(errors="replace").decode()


def is_absent(value: Any) -> bool:
    """Whether a value stands for none: null, or not a number, as tables write it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def without_absent(value: Any) -> Any:
    """A JSON value without the keys whose values stand for none; Arrow gives every row all keys of all rows."""
    if isinstance(value, Mapping):
        return {key: without_absent(item) for key, item in value.items() if not is_absent(item)}
    return [without_absent(item) for item in value] if isinstance(value, list) else value


def parse_line(text: str, path: Path, line: int) -> Conversation:
    """One line of the manifest `path`.

    Raises:
        ManifestError: it is wrong.
    """

    def wrong(key: str, problem: str) -> ManifestError:
        return ManifestError(f"{path}, line {line}, key {key!r}: {problem}")

    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one JSON list is converted by tools/convert_data.py" if text.lstrip()[:1] == "[" else ""
        raise ManifestError(f"{path}, line {line}: no valid JSON ({error}){hint}") from error
    if not isinstance(row, dict):
        raise ManifestError(f"{path}, line {line}: a JSON object is needed, this is a {type(row).__name__}")
    row = without_absent(row)
    messages = row.get("messages")
    if messages is None:
        near = difflib.get_close_matches("messages", list(row), 1)
        hint = f"; is {near[0]!r} meant?" if near else ""
        if "conversations" in row:
            hint = "; this is ShareGPT form: convert the file with tools/convert_data.py"
        raise wrong("messages", f"missing, the line has {sorted(row)}{hint}")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "a non-empty list is needed")
    system = _system(row, messages, wrong)
    queues = {kind: _files(row, kind, wrong) for kind in KINDS}
    media: list[MediaPart] = []
    parsed = [
        _message(message, f"messages[{i}]", queues, media, path.parent, wrong) for i, message in enumerate(messages)
    ]
    if left := [f"{kind}s" for kind in KINDS if queues[kind]]:
        raise wrong(left[0], f"more files than <{left[0][:-1]}> tags in the messages")
    taken = ("id", "messages", "system", *(f"{kind}s" for kind in KINDS))
    meta = {key: value for key, value in row.items() if key not in taken}
    return Conversation(str(row.get("id", line)), (*system, *parsed), tuple(media), meta)


def _system(row: Mapping[str, Any], messages: Sequence[Any], wrong: Any) -> list[dict[str, Any]]:
    """The message that the line's key `system` stands for, if it is not among them."""
    text = row.get("system", "")
    if not isinstance(text, str):
        raise wrong("system", "a string is needed")
    own = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "system"]
    if own and text not in ("", own[0]):
        raise wrong("system", "the messages have another system message; keep one of the two")
    return [{"role": "system", "content": text}] if text and not own else []


def _files(row: Mapping[str, Any], kind: str, wrong: Any) -> list[str]:
    value = row.get(f"{kind}s", [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong(f"{kind}s", "a list of paths is needed")
    return list(value)


def _message(
    message: Any, key: str, queues: dict[str, list[str]], media: list[MediaPart], folder: Path, wrong: Any
) -> dict[str, Any]:
    """One message with normalised content; its media are appended to `media`."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise wrong(f"{key}.role", f"one of {', '.join(ROLES)} is needed")
    if not isinstance(message.get("loss", False), bool):
        raise wrong(f"{key}.loss", "true or false is needed")
    if message.get("loss") and message["role"] != "assistant":
        raise wrong(f"{key}.loss", f"only assistant messages are learnt, this one is {message['role']!r}")
    content = message.get("content")
    if isinstance(content, str) and message["role"] != "assistant":
        content = _split_tags(content)
        for part in content:
            kind = part["type"]
            if kind == "text":
                continue
            if not queues[kind]:
                raise wrong(f"{kind}s", f"fewer files than <{kind}> tags in the messages")
            media.append(MediaPart(kind, folder / queues[kind].pop(0)))
        if all(part["type"] == "text" for part in content):
            content = message["content"]
    elif isinstance(content, list):
        content = [_part(part, f"{key}.content[{i}]", media, folder, wrong) for i, part in enumerate(content)]
    elif not isinstance(content, str):
        raise wrong(f"{key}.content", "a string or a list of parts is needed")
    if message["role"] != "user" and any(part["type"] != "text" for part in _parts(content)):
        raise wrong(f"{key}.content", f"media belong to user messages, this one is {message['role']!r}")
    return {**message, "content": content}


def _part(part: Any, key: str, media: list[MediaPart], folder: Path, wrong: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise wrong(f"{key}.text", "a string is needed")
        return {"type": "text", "text": part["text"]}
    if kind not in KINDS:
        raise wrong(f"{key}.type", f"one of text, {', '.join(KINDS)} is needed, this is {kind!r}")
    unknown = set(part) - {"type", kind} - (set(_SAMPLING) if kind == "video" else set())
    if unknown:
        raise wrong(
            f"{key}.{min(unknown)}",
            f"unknown; the keys of {kind} parts are type, {kind}" + (", fps, max_frames" * (kind == "video")),
        )
    if not isinstance(part.get(kind), str):
        raise wrong(f"{key}.{kind}", "the path of the file is needed")
    for name, types in _SAMPLING.items():
        value = part.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, types) or value <= 0):
            raise wrong(f"{key}.{name}", f"a positive {'number' if float in types else 'integer'} is needed")
    media.append(MediaPart(kind, folder / part[kind], part.get("fps"), part.get("max_frames")))
    return {"type": kind}


def _split_tags(text: str) -> list[dict[str, Any]]:
    """ "<video>What?" as parts."""
    pieces = _TAG.split(text)
    parts = [{"type": "text", "text": piece} if i % 2 == 0 else {"type": piece} for i, piece in enumerate(pieces)]
    return [part for part in parts if part.get("text") != ""]


def _parts(content: str | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return "".join(part["text"] for part in _parts(content) if part["type"] == "text")
