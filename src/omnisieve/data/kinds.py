"""What sort of medium a file is, by its content."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO

import av
from PIL import Image

from omnisieve.data._decoder import CONTAINERS
from omnisieve.data.images import FORMATS, claimed, has_frames

_FILMS = ("GIF", "PNG")
"""Image formats whose frames FFmpeg decodes as a video."""
_PHOTOS = (b"heic", b"heix", b"heim", b"heis", b"mif1")
"""Brands of HEIF, which FFmpeg would take for a film; `images` says how to cure it."""


def kind_of(file: str | Path | bytes) -> str | None:
    """ "video", "audio" or "image", by what a file's header says; None if it is none of them, or is not there.

    A video has moving pictures, with or without sound; a cover picture does not make one of a sound. An animated GIF
    or PNG is one; other animated images are images, which reading refuses.

    Args:
        file: its path or its content.
    """
    try:
        if not isinstance(file, bytes) and not os.path.isfile(file):
            return None
        with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as content:
            return _kind_of(content)
    except (OSError, ValueError):  # no such file, or a name that the system refuses
        return None


def _kind_of(content: BinaryIO) -> str | None:
    head = content.read(12)
    if head[4:8] == b"ftyp" and head[8:] in _PHOTOS:
        return "image"
    content.seek(0)
    try:
        with Image.open(content, formats=FORMATS) as image:
            return "video" if image.format in _FILMS and has_frames(image) else "image"
    except Exception:  # a damaged image is told by whatever reads it
        content.seek(0)
        if claimed(content.read(16)) is not None:
            return "image"
        content.seek(0)
    try:
        with av.open(content, options={"format_whitelist": CONTAINERS}) as container:
            cover = av.stream.Disposition.attached_pic
            if any(not stream.disposition & cover for stream in container.streams.video):
                return "video"
            return "audio" if container.streams.audio else None
    except Exception:  # likewise
        return None
