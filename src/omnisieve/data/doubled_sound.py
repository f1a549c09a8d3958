"""Sound that would be heard twice: a video's own, and the same again as a file beside it.

Frameworks that read no sound from videos have it extracted and write `<video><audio>`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
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
        numbers of sounds, counted over the conversation, that are as long as the sound of a video, one for each video;
        and whether there are others beside a video with sound.
    """
    sounds = [part.path for part in conversation.media if part.kind == "audio"]
    videos = [part.path for part in conversation.media if part.kind == "video"] if sounds else []
    lengths = [seconds for path in videos if (seconds := _seconds(reader, path, video=True)) is not None]
    if not lengths:
        return set(), False
    doubled: set[int] = set()
    others = False
    for number, path in enumerate(sounds):
        seconds = _seconds(reader, path, video=False)
        if seconds is None:
            continue
        same = min(lengths, key=lambda length: abs(length - seconds), default=math.inf)
        if abs(same - seconds) <= _SECONDS:
            doubled.add(number)
            lengths.remove(same)
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


def _seconds(reader: MediaReader, path: Path, *, video: bool) -> float | None:
    try:
        info = reader.probe(path, video=video)
    except MediaError:  # whoever decodes it says what is wrong
        return None
    return None if info.audio is None else info.audio.seconds
