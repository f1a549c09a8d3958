"""Data sets in other layouts, as lines of a manifest in messages form.

What an entry may be, by its keys:

| keys | form |
|---|---|
| `messages` | messages form already; its paths change, and numbers as answers become texts |
| `conversations` | ShareGPT, LLaVA, LLaVA-Video: turns of `from` and `value`, or of `role` and `content` |
| `query`, `instruction` | ms-swift, Alpaca: perhaps with `response` or `output`, and `history`, pairs of texts |
| otherwise | a path, a question and perhaps an answer and options, in columns |

All but the last have files in `video(s)`, `audio(s)`, `image(s)`, and perhaps `system`. Each may have options of its
one question, which are asked with it. All other keys are kept, `id` among them. A key that is null (or NaN) counts as
absent; an answer that is there but null is no answer.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omnisieve.data.choices import Options, ask, is_asked, options_of
from omnisieve.data.doubled_sound import doubled_sounds, without_sounds
from omnisieve.data.manifest import KINDS, Conversation, ManifestError, no_path, parse_line
from omnisieve.data.media import MediaReader
from omnisieve.data.sources import Entry, FormatError, kind_of_entry
from omnisieve.files import replacing

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip
_PAIRS = (("query", "response"), ("instruction", "output"))
_NO_ANSWERS = ("nan", "NaN", "[]")  # as tables are written by programs
_FORM_KEYS = {"messages", "conversations", *(question for question, _ in _PAIRS)}
_LIKE_ANSWER = re.compile(
    r"(correct|right|gold)?answers?(key|idx|index|id|letter|text)?|correct(option|choice|idx)?|groundtruth|gt|labels?|"
    r"gold|output|response|solution|target"
)
_TURN_KEYS = (("from", "value"), ("role", "content"))
_PATH_COLUMNS = ("path", *(name for kind in KINDS for name in (kind, f"{kind}_path", f"{kind}s")), "file_name")
# LLaVA's line breaks between a placeholder and the text separate the two and are part of neither.
_PLACEHOLDER = re.compile(r"\n*(<(?:video|audio|image)>)\n*")


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table.

    Attributes:
        path: of the media file; None: path, or else those of video, video_path, videos, audio, ..., or else file_name.
        question, answer: of the texts; entries without such an answer column are unlabelled.
        options: of the answers to choose from, see `choices.options_of`.
    """

    path: str | None = None
    question: str = "question"
    answer: str = "answer"
    options: str | None = None


@dataclass(frozen=True)
class Skipped:
    """An entry that cannot be used: where it stands, its id if it has one, and why."""

    where: str
    id: str | None
    reason: str


class Converter:
    """Entries to lines of a manifest.

    Attributes:
        doubled: entries whose videos' sound was there as a file, too, which was left out.
        beside: entries that have other sound files beside a video with sound; all are heard.
        unlabelled: entries without an answer.
        like_answers: names of columns of these that look as if they held the answer.
        dropped: names of columns left out, which hold what JSON cannot.
    """

    def __init__(
        self,
        out: Path,
        media_root: Path,
        *,
        columns: Columns | None = None,
        question: str | None = None,
        allow_missing: bool = False,
        sound: Literal["video", "both"] = "video",
    ) -> None:
        """
        Args:
            out: the manifest to be; media paths are made relative to its folder.
            media_root: what relative paths of the source are relative to.
            columns: of a table.
            question: asked where an entry has none.
            allow_missing: take media files that are not there.
            sound: "video": a sound file that says what its video says again is left out; "both": all are kept.
        """
        self.doubled = self.beside = self.unlabelled = 0
        self.like_answers: set[str] = set()
        self.dropped: set[str] = set()
        self._out = out
        self._folder = out.parent.resolve()
        self._root = media_root
        self._columns = columns or Columns()
        self._question = question
        self._allow_missing = allow_missing
        self._reader = MediaReader() if sound == "video" else None

    def convert(self, entry: Entry) -> str | Skipped:
        """One line of the manifest, without its end; or why there is none."""
        identity = _identity(entry.row.get("id"))
        try:
            if entry.error is not None:
                raise FormatError(entry.error)
            row = self._with_places(to_messages(entry.row, self._columns, self._question, self._root))
            row = self._in_json(row)
            if identity is None or "id" not in row:
                row.pop("id", None)
                row = {"id": entry.where.removeprefix("file "), **row}
            # What is written can be read: the manifest's own rules decide.
            conversation = parse_line(_line(row), self._out, 0)
            unread = next((name for name in _PATH_COLUMNS if row.get(name)), None)
            if unread is not None and not conversation.media:
                raise FormatError(
                    f"the file in {unread!r} would not be read: name it in the messages (a part, or a tag beside "
                    "a list videos, audios or images); in other forms, use the key video, audio or image"
                )
        except ManifestError as error:
            return Skipped(entry.where, identity, str(error).removeprefix(f"{self._out}, line 0, "))
        except (FormatError, TypeError) as error:
            return Skipped(entry.where, identity, str(error))
        except RecursionError:
            return Skipped(entry.where, identity, "nested too deeply")
        paths = [] if self._allow_missing else [part.path for part in conversation.media]
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            return Skipped(entry.where, identity, f"{os.path.normpath(missing[0])}: there is no such file")
        self._note_answer(entry.row, conversation)
        return _line(row if self._reader is None else self._heard_once(row, conversation, self._reader))

    def _in_json(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row without the columns that JSON cannot hold."""
        try:
            json.dumps(row)
        except TypeError:
            unfit = {key for key, value in row.items() if key != "messages" and not _is_json(value)}
            self.dropped |= unfit
            return {key: value for key, value in row.items() if key not in unfit}
        return row

    def _note_answer(self, row: Mapping[str, Any], conversation: Conversation) -> None:
        if any(message["role"] == "assistant" for message in conversation.messages):
            return
        self.unlabelled += 1
        if not row.keys() & _FORM_KEYS:
            self.like_answers |= {key for key in row if _LIKE_ANSWER.fullmatch(re.sub("[_ ]", "", key).lower())}

    def _heard_once(self, row: dict[str, Any], conversation: Conversation, reader: MediaReader) -> dict[str, Any]:
        doubled, others = doubled_sounds(conversation, reader)
        self.doubled += bool(doubled)
        self.beside += others
        return without_sounds(row, doubled) if doubled else row

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
            with replacing(path, lambda _: False) as staged:
                staged.write_bytes(content)
        return f"{folder}/{path.name}"


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _identity(own: Any) -> str | None:
    try:
        return None if is_absent(own) or own == "" else str(own)
    except RecursionError:  # said when the row is written
        return None


def is_absent(value: Any) -> bool:
    """Whether a value stands for none: null, or not a number, as tables write it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def without_absent(value: Any) -> Any:
    """A value without the keys whose values stand for none; Arrow gives every row all keys of all rows."""
    if isinstance(value, Mapping):
        return {key: without_absent(item) for key, item in value.items() if not is_absent(item)}
    return [without_absent(item) for item in value] if isinstance(value, list) else value


def _line(row: Mapping[str, Any]) -> str:
    """A row as JSON.

    Raises:
        FormatError: its text cannot be written as UTF-8.
    """
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError as error:
        half = json.dumps(line[error.start])
        raise FormatError(f"half a character (the lone surrogate {half}); write it whole") from error
    return line


def to_messages(
    row: Mapping[str, Any], columns: Columns, question: str | None = None, root: Path = Path()
) -> dict[str, Any]:
    """A row of any form in messages form; see the module's table. Paths in it are relative to `root`.

    Raises:
        FormatError: it has none of the forms.
    """
    present = without_absent(row)
    if "messages" in present:
        return _with_options({**present, "messages": _with_answers(present["messages"])}, columns)
    if "conversations" in present:
        return _with_options(_from_sharegpt(present), columns)
    for question_key, answer_key in _PAIRS:
        if question_key in present and columns.question not in present:
            return _from_pairs(row, question_key, answer_key, columns)
    return _from_table(row, columns, question, root)


def _with_answers(messages: Any) -> Any:
    """Messages whose answers are texts; of other mistakes the manifest's rules speak."""
    if not isinstance(messages, list):
        return messages
    return [
        {**message, "content": _turn_answer(message.get("content"), f"messages[{index}].content")}
        if isinstance(message, Mapping) and message.get("role") == "assistant"
        else message
        for index, message in enumerate(messages)
    ]


def _turn_answer(content: Any, where: str) -> Any:
    """An answer as text, or in parts as it is."""
    return content if isinstance(content, list) and _text_of(content).strip() else _answer(content, where)


def _text_of(content: Any) -> str:
    """The text of a message's content, which may be wrong in any way."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))


def _with_options(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """A row in messages form with its options asked.

    Raises:
        FormatError: it is not clear in which question.
    """
    options, used = options_of(row, columns.options)
    messages = row["messages"]
    if options is None or not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        return row
    asked = [index for index, message in enumerate(messages) if message.get("role") == "user"]
    if len(asked) != 1:
        if any(is_asked(_text_of(messages[index].get("content")), options) for index in asked):
            return row
        raise FormatError(
            f"there are options, column {', '.join(sorted(used))}, and {len(asked)} questions: which one they belong "
            "to is not known; write them into it, and give the column another name"
        )
    rest = {key: value for key, value in row.items() if key not in used}
    return {**rest, "messages": _choice(messages, asked[0], options)}


def _choice(messages: list[Any], index: int, options: Options) -> list[Any]:
    """Messages with options behind the question at `index`, and their answer behind it checked."""
    messages = list(messages)
    question = messages[index].get("content")
    replies = index + 1 < len(messages) and messages[index + 1].get("role") == "assistant"
    answer = _text_of(messages[index + 1]["content"]) if replies else None
    before = _text_of(question)
    text, checked = ask(before, options, answer)
    added = text.removeprefix(before)
    if added:
        content = [*question, {"type": "text", "text": added}] if isinstance(question, list) else text
        messages[index] = {**messages[index], "content": content}
    if checked != answer:
        messages[index + 1] = {**messages[index + 1], "content": checked}
    return messages


def _from_sharegpt(row: Mapping[str, Any]) -> dict[str, Any]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise FormatError("'conversations' is no list of turns")
    messages = [_turn(turn, index) for index, turn in enumerate(turns)]
    return _with_files({key: value for key, value in row.items() if key != "conversations"}, messages)


def _turn(turn: Any, index: int) -> dict[str, Any]:
    where = f"conversations[{index}]"
    keys = next((keys for keys in _TURN_KEYS if isinstance(turn, Mapping) and keys[0] in turn), None)
    if keys is None:
        raise FormatError(f"{where} is no object with 'from' and 'value', or 'role' and 'content'")
    role = _ROLES.get(str(turn[keys[0]]))
    if role is None:
        raise FormatError(f"{where}.{keys[0]} is {turn[keys[0]]!r}; one of {', '.join(_ROLES)} is needed")
    content = turn.get(keys[1])
    if role == "assistant" and keys[1] == "content":
        content = _turn_answer(content, f"{where}.content")
    elif role == "assistant":
        content = _answer(content, f"{where}.{keys[1]}")
    # What is in parts is messages form already.
    if not isinstance(content, str) and not (keys[1] == "content" and isinstance(content, list)):
        raise FormatError(f"{where}.{keys[1]}: a string is needed")
    return {**{k: v for k, v in turn.items() if k not in keys}, "role": role, "content": content}


def _from_pairs(row: Mapping[str, Any], question_key: str, answer_key: str, columns: Columns) -> dict[str, Any]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise FormatError("'history' is no list of pairs, a question and its answer each")
    question = row[question_key]
    if row.get("input"):  # Alpaca's own addition
        question = f"{question}\n{row['input']}"
    messages = []
    for asked, *answer in (*history, [question, *([row[answer_key]] if answer_key in row else [])]):
        if not isinstance(asked, str):
            raise FormatError(f"a question is {asked!r}; a string is needed")
        messages.append({"role": "user", "content": asked})
        messages += [{"role": "assistant", "content": _answer(text, f"column {answer_key!r}")} for text in answer]
    rest = without_absent({key: value for key, value in row.items() if key not in (question_key, answer_key, "input")})
    options, used = options_of(rest, columns.options)
    if options is not None:
        messages = _choice(messages, 2 * len(history), options)
    return _with_files({key: value for key, value in rest.items() if key not in {"history", *used}}, messages)


def _with_files(row: Mapping[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Messages with the files of a row, whose other keys are kept.

    Without any placeholder the files go before the first question. LLaVA-Video writes `<image>` where its video goes.
    """
    files = {f"{kind}s": _files(row, kind) for kind in KINDS}
    asked = [m for m in messages if m["role"] == "user" and isinstance(m["content"], str)]
    for message in asked:
        message["content"] = _PLACEHOLDER.sub(r"\1", message["content"])
        if files["videos"] and not files["images"]:
            message["content"] = message["content"].replace("<image>", "<video>")
    if asked and not any(_PLACEHOLDER.search(message["content"]) for message in asked):
        tags = "".join(f"<{kind}>" * len(files[f"{kind}s"]) for kind in KINDS)
        asked[0]["content"] = tags + asked[0]["content"]
    rest = {key: value for key, value in row.items() if key not in (*KINDS, *files)}
    return {**rest, "messages": messages, **{name: values for name, values in files.items() if values}}


def _answer(value: Any, where: str) -> str:
    """An answer as text; numbers and truth values as JSON writes them.

    Raises:
        FormatError: it is not one text.
    """
    if isinstance(value, str) and value.strip() in _NO_ANSWERS:
        raise FormatError(f"the answer, {where}, is {value!r}, which stands for none")
    if isinstance(value, str) and value.strip():
        return value
    if is_absent(value) or isinstance(value, str):
        what = "not a number (NaN)" if isinstance(value, float) else "empty"
        raise FormatError(f"the answer, {where}, is {what}")
    if not isinstance(value, bool | int | float) or value in (math.inf, -math.inf):
        raise FormatError(f"the answer, {where}, is {value!r}; one text is needed")
    return json.dumps(value)


def _files(row: Mapping[str, Any], kind: str) -> list[Any]:
    """Files of one kind: KIND or KINDs, one or a list."""
    if row.get(kind) is not None and row.get(f"{kind}s") is not None:
        raise FormatError(f"both {kind!r} and '{kind}s' are given; keep one")
    value = row.get(kind) if row.get(kind) is not None else row.get(f"{kind}s")
    return [] if value is None or value == "" else list(value) if isinstance(value, list) else [value]


def _from_table(row: Mapping[str, Any], columns: Columns, question: str | None, root: Path) -> dict[str, Any]:
    present = without_absent(row)
    media = _media(present, columns, root)
    asked = present.get(columns.question) or question
    if not isinstance(asked, str):
        raise FormatError(
            f"no question in column {columns.question!r}; name another with --columns question=NAME, or add --question"
        )
    options, used = options_of(present, columns.options)
    answer = _answer(row[columns.answer], f"column {columns.answer!r}") if columns.answer in row else None
    text, answer = (asked, answer) if options is None else ask(asked, options, answer)
    parts = [{"type": kind, kind: file} for _, kind, file in media]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    taken = {*(name for name, *_ in media), columns.question, columns.answer, *used}
    return {**{key: value for key, value in present.items() if key not in taken}, "messages": messages}


def _media(row: Mapping[str, Any], columns: Columns, root: Path) -> list[tuple[str, str, Any]]:
    """Column, kind and file of the media of a row: of the column `path`, or of one column for each kind."""
    found = [name for name in ([columns.path] if columns.path else _PATH_COLUMNS) if row.get(name)]
    if not found:
        raise FormatError(f"no path: the columns are {', '.join(map(repr, row))}; name one with --columns path=NAME")
    kinds = [next((kind for kind in KINDS if name.startswith(kind)), None) for name in found]
    chosen = [0] if kinds[0] is None else [kinds.index(kind) for kind in KINDS if kind in kinds]
    files = {index: value if isinstance(value := row[found[index]], list) else [value] for index in chosen}
    # Columns are named after video whatever is in them.
    return [
        (found[index], kind_of_entry(file, root) if kinds[index] in (None, "video") else str(kinds[index]), file)
        for index in chosen
        for file in files[index]
    ]
