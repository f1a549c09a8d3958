"""JSONL manifests in `messages` form.

One line is one conversation:

    {"id": "clip-7",
     "messages": [
       {"role": "user", "content": [{"type": "video", "video": "clips/7.mp4", "fps": 2, "max_frames": 128},
                                    {"type": "text", "text": "What is said?"}], "family": "speech"},
       {"role": "assistant", "content": "hello"}]}

or with tags in a string: `"content": "<video>What is said?"` beside `"videos": ["clips/7.mp4"]`, likewise `<image>`
with `images` and `<audio>` with `audios`; a tag takes the next file of its list. Paths are relative to the
manifest's folder. `"audio_track": 1` in a part names a sound track, counted from 0. Every other key, of the line or of
a message, is kept; one that is null counts as absent. Whether a video has sound is read from the file, never from the
manifest. Other layouts are converted, see `formats`.

`id` defaults to the line's number, and one that an earlier line has gets its line behind it: "clip-7 (line 12)". Two
more keys mean what they do in ms-swift: `system` of a line is a system message before all others, and `"loss": false`
of an assistant message keeps training from learning it.

A line that breaks these rules is an error of the manifest. A line whose text holds a mark that the models' templates
write (`<|VIDEO|>`, `<|im_end|>`) is read, but is no sample that can be used: see `Conversation.mark`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import datasets

from omnisieve.data.errors import DataError, SampleError, described, shortened

KINDS = ("video", "audio", "image")
ROLES = ("system", "user", "assistant")
# Missing files that a message names.
_NAMED = 3
_TAG = re.compile(r"<(video|audio|image)>")
# What stands for media and turns in the templates of Qwen2.5-Omni and of Qwen3-Omni.
_MARK = re.compile(
    r"<\|(?:VIDEO|AUDIO|IMAGE|(?:video|audio|image|vision)_(?:pad|bos|eos|start|end)|im_(?:start|end))\|>"
)
_DATA_URL = re.compile(r"data:[^,]*,", re.IGNORECASE)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{256,}={0,2}\s*")
_FEW_CHARACTERS = 20  # more than that are in the base64 of any file, and in few names
_SHOWN = 60
_FASTEST = 1e6  # frames per second; more are a slip of the pen
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_OPTIONS: dict[str, tuple[str, ...]] = {
    "video": ("fps", "max_frames", "audio_track"),
    "audio": ("audio_track",),
    "image": (),
}
"""Keys of a part that say how its file is read."""


class ManifestError(DataError):
    """A manifest that cannot be used; the message names file, line, key and cure."""


@dataclass(frozen=True)
class MediaPart:
    """One medium of a conversation: `kind` "video", "audio" or "image", and how its file is read.

    `fps` and `max_frames` sample a video, `audio_track` is the sound track to hear, if not the default one.
    `max_pixels` of a frame is set where a video is read more thinly for a limit on tokens: under a cap on the whole
    video, fewer frames would be larger. A manifest does not give it.
    """

    kind: str
    path: Path
    fps: float | None = None
    max_frames: int | None = None
    max_pixels: int | None = None
    audio_track: int | None = None


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

    @property
    def file(self) -> str:
        """Path of its first medium; empty without media."""
        return str(self.media[0].path) if self.media else ""

    def mark(self) -> str | None:
        """The first mark of a template in its texts, such as `<|VIDEO|>`: it would be taken for a medium or a turn."""
        found = (_MARK.search(_text(message["content"])) for message in self.messages)
        return next((match.group() for match in found if match), None)

    def text_error(self, reason: str) -> SampleError:
        """It cannot be used for a reason that lies in its text."""
        cure = "correct the text, or take the line out of the manifest"
        return SampleError(self.file, "text", f"conversation {self.id}: {reason}", cure)

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
        if not os.path.isfile(self.path):
            raise ManifestError(f"{path}: there is no such manifest; give the path of a JSONL file")
        try:
            with self.path.open(encoding="utf-8") as file:
                # Files that were joined have byte-order marks within.
                lines = [(number, line.lstrip("\ufeff")) for number, line in enumerate(file, 1)]
                lines = [(number, line) for number, line in lines if line.strip()]
        except UnicodeDecodeError as error:
            raise ManifestError(f"{path}: the manifest is not UTF-8 ({error}); save it as such") from error
        except OSError as error:
            raise ManifestError(f"{path}: the manifest cannot be read: {described(error)}") from error
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

    def check(self, limit: int | None = None, *, files: bool = True) -> list[str]:
        """Read the first `limit` lines, or all, and with `files` look for their media files.

        Returns:
            what a run should say before it starts: samples that cannot be used, and will be replaced or left out.

        Raises:
            ManifestError: at the first wrong line; or, naming some of them, because files are missing, or because no
                sample can be used.
        """
        first_lines: dict[Path, int] = {}
        marked: list[str] = []
        lines = 0
        for row in islice(self._table, limit):
            conversation = parse_line(row["text"], self.path, row["line"])
            lines += 1
            for part in conversation.media:
                first_lines.setdefault(part.path, row["line"])
            if (mark := conversation.mark()) is not None:
                marked.append(f"line {row['line']}: {holds(mark)}")
        missing = [f"line {line}: {path}" for path, line in first_lines.items() if files and _is_missing(path)]
        if missing:
            raise ManifestError(
                f"{self.path}: {len(missing)} of {len(first_lines)} media files are missing: {_some(missing)}. Correct "
                f"the paths (they are relative to {self.path.parent}), copy the files there, or take the lines out"
            )
        if not marked:
            return []
        found = f"{self.path}: {len(marked)} of {lines} samples cannot be used: {_some(marked)}. Correct the texts"
        if len(marked) == lines:
            raise ManifestError(found)
        return [found]


def holds(mark: str) -> str:
    """What is wrong with a text that holds a mark of a template."""
    return f"the text holds {mark}, which the model would take for a medium or a turn of its own"


def _some(found: Sequence[str]) -> str:
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + more


def _is_missing(path: Path) -> bool:
    """Whether there is no file. A path that the system refuses, as too long, is its sample's error."""
    try:
        return not path.is_file() and "\0" not in str(path)
    except OSError:
        return False


def no_path(text: str) -> str | None:
    """Why a text is no path of a file, with the cure; None if it may be one."""
    if not text:
        return "it is empty; give the path of the file"
    shown, text = shortened(text, _SHOWN), text.strip()
    if _DATA_URL.match(text):
        return f"{shown} is a data URL, the content itself; write it to a file and give the file's path"
    if text[:6].lower() == "file:/":
        return f"{shown} is a file URL; give the path alone, {unquote(urlsplit(text).path)}"
    if _ADDRESS.match(text):
        return f"{shown} is an address; download the file and give its path"
    if _BASE64.fullmatch(text) and len(set(text)) > _FEW_CHARACTERS:
        return f"{shown} looks like base64, the content itself; write it to a file and give the file's path"
    return None


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
    if name is None or name == "" or name != name:  # some write NaN for a missing number
        return None
    # Half a character would break the column; it is said when the line is read.
    return str(name).encode(errors="replace").decode()


def without_null(value: Any) -> Any:
    """A JSON value without the keys whose values are null; Arrow gives every row all keys of all rows."""
    if isinstance(value, Mapping):
        return {key: without_null(item) for key, item in value.items() if item is not None}
    return [without_null(item) for item in value] if isinstance(value, list) else value


def parse_line(text: str, path: Path, line: int) -> Conversation:
    """One line of the manifest `path`.

    Raises:
        ManifestError: it is wrong.
    """

    def wrong(key: str, problem: str) -> ManifestError:
        return ManifestError(f"{path}, line {line}, key {key!r}: {problem}")

    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "; one JSON list is converted by tools/convert_data.py" if text.lstrip()[:1] == "[" else ""
        raise ManifestError(f"{path}, line {line}: no valid JSON ({error}){hint}") from error
    if _SURROGATE.search(text) and not _is_unicode(row):
        raise ManifestError(f"{path}, line {line}: half a character (a lone surrogate such as \\ud83d); write it whole")
    if not isinstance(row, dict):
        raise ManifestError(f"{path}, line {line}: a JSON object is needed, this is a {type(row).__name__}")
    row = without_null(row)
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
    for index, item in enumerate(value):
        if (problem := no_path(item)) is not None:
            raise wrong(f"{kind}s[{index}]", problem)
    return list(value)


def _is_unicode(row: Any) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


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
    known = ("type", kind, *_OPTIONS[kind])
    if unknown := set(part) - set(known):
        raise wrong(f"{key}.{min(unknown)}", f"unknown; the keys of {kind} parts are {', '.join(known)}")
    if not isinstance(part.get(kind), str):
        raise wrong(f"{key}.{kind}", "the path of the file is needed")
    if (problem := no_path(part[kind])) is not None:
        raise wrong(f"{key}.{kind}", problem)
    options = {name: part[name] for name in _OPTIONS[kind] if part.get(name) is not None}
    for name, value in options.items():
        if (needed := _not_valid(name, value)) is not None:
            raise wrong(f"{key}.{name}", f"{needed} is needed")
    media.append(MediaPart(kind, folder / part[kind], **options))
    return {"type": kind}


def _not_valid(name: str, value: Any) -> str | None:
    """What an option of a part should be; None if it is that."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "fps":
        return None if number and 0 < value < _FASTEST else "a positive number"
    if name == "audio_track":
        return None if number and isinstance(value, int) and value >= 0 else "the number of a sound track, from 0 on,"
    return None if number and isinstance(value, int) and value > 0 else "a positive integer"


def _split_tags(text: str) -> list[dict[str, Any]]:
    """ "<video>What?" as parts."""
    pieces = _TAG.split(text)
    parts = [{"type": "text", "text": piece} if i % 2 == 0 else {"type": piece} for i, piece in enumerate(pieces)]
    return [part for part in parts if part.get("text") != ""]


def _parts(content: str | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return "".join(part["text"] for part in _parts(content) if part["type"] == "text")
