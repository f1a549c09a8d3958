"""Sound that would be heard twice: a video's own, and the same again as a file beside it.

Frameworks that read no sound from videos have it extracted and write `<video><audio>`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omnisieve.data.manifest import Conversation
from omnisieve.data.media import MediaError, MediaReader

_TAG = re.compile("<audio>")
_SECONDS = 1.0
"""Lengths of extracted sound and of the video's differ by the padding of codecs."""


def doubled_sounds(conversation: Conversation, reader: MediaReader) -> tuple[set[int], bool]:
    """Which sounds of a conversation its videos have, too.

    Returns:
        numbers of sounds, counted over the conversation, that stand beside a video with a sound as long; and whether
        there are others beside a video with sound.
    """
    doubled: set[int] = set()
    others = False
    for video, audio, number in _side_by_side(conversation):
        own, file = _seconds(reader, video, video=True), _seconds(reader, audio, video=False)
        if own is None or file is None:
            continue
        if abs(own - file) <= _SECONDS:
            doubled.add(number)
        else:
            others = True
    return doubled, others


def without_sounds(row: Mapping[str, Any], dropped: Collection[int]) -> dict[str, Any]:
    """A row in messages form without some of its sounds; their numbers count over the conversation."""
    number, files = -1, list(row.get("audios", []))
    kept_files: list[Any] = []

    def keep(tag: re.Match[str]) -> str:
        nonlocal number
        number += 1
        file = files.pop(0)
        if number in dropped:
            return ""
        kept_files.append(file)
        return tag.group()

    def content(message: Mapping[str, Any]) -> Any:
        nonlocal number
        if message["role"] != "user":
            return message["content"]
        if isinstance(message["content"], str):
            return _TAG.sub(keep, message["content"])
        parts = []
        for part in message["content"]:
            number += part["type"] == "audio"
            if part["type"] != "audio" or number not in dropped:
                parts.append(part)
        return parts

    messages = [{**message, "content": content(message)} for message in row["messages"]]
    rest = {key: value for key, value in row.items() if key != "audios"}
    return {**rest, "messages": messages, **({"audios": kept_files} if kept_files else {})}


def _side_by_side(conversation: Conversation) -> Iterator[tuple[Path, Path, int]]:
    """Videos, sounds and numbers of the sounds, in pairs: the first video and the first sound of a run of media, ..."""
    media = iter(conversation.media)
    sounds = 0
    for message in conversation.messages:
        run: dict[str, list[tuple[Path, int]]] = {"video": [], "audio": []}
        for part in (*_parts(message["content"]), {"type": "text", "text": "."}):
            if part["type"] == "text" and part["text"].strip():
                yield from ((v, a, number) for (v, _), (a, number) in zip(run["video"], run["audio"], strict=False))
                run = {"video": [], "audio": []}
            elif part["type"] != "text":
                run.setdefault(part["type"], []).append((next(media).path, sounds))
                sounds += part["type"] == "audio"


def _parts(content: str | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return () if isinstance(content, str) else content


def _seconds(reader: MediaReader, path: Path, *, video: bool) -> float | None:
    try:
        info = reader.probe(path, video=video)
    except MediaError:  # whoever decodes it says what is wrong
        return None
    return None if info.audio is None else info.audio.seconds
