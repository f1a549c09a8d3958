"""What is wrong with media files, and what is unusual about them, as rows of a report.

A row is a JSON object: `path`, `kind`, what identifies the look that was taken (`bytes`, `changed`, `asked`), the
content as `media.MediaInfo` has it, `run`, its size in tokens, `notes`, and `problem`, None if the file can be used.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.utils.data import Dataset

from omnisieve.data.dataset import MediaLoader, foreign_media_errors, sampling_of
from omnisieve.data.images import read_image
from omnisieve.data.manifest import MediaPart
from omnisieve.data.media import MediaError, MediaInfo, MediaReader
from omnisieve.data.protocol import Protocol
from omnisieve.data.tokens import AudioRun, ImageRun, Run, VideoRun

Row = dict[str, Any]
_RUNS: dict[str, type] = {"video": VideoRun, "audio": AudioRun, "image": ImageRun}
_LATE_SECONDS = 0.05
_LOOK = 2
"""Changes when a look finds what it did not find before: rows of earlier reports then no longer hold."""
_WIDEST = 200
"""Longer side over shorter side that the stock processors take."""


@dataclass(frozen=True)
class Sampling:
    """How files are read: which frames, seconds of sound at most, seconds for decoding a file."""

    frames: Protocol | MediaLoader
    max_seconds: float
    decode_seconds: float


class Files(Dataset[Row]):
    """Probes files, in worker processes."""

    def __init__(
        self, parts: Sequence[MediaPart], sampling: Sampling, loader: MediaLoader | None = None, *, decode: bool = False
    ) -> None:
        """
        Args:
            parts: the files.
            sampling: of a recipe.
            loader: of the same recipe; sizes in tokens are known with it.
            decode: also read the files as training does.
        """
        self.parts, self.sampling, self.loader, self.decode = parts, sampling, loader, decode
        self.reader = loader.reader if loader is not None else MediaReader(decode_seconds=sampling.decode_seconds)

    def choose(self, indices: Sequence[int]) -> Files:
        """Only some of them."""
        return Files([self.parts[i] for i in indices], self.sampling, self.loader, decode=self.decode)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Row:
        part = self.parts[index]
        row = {**self.identity(index), "problem": None, "notes": []}
        try:
            with foreign_media_errors(part):
                return row | self.look(part)
        except MediaError as error:
            problem = {"kind": error.kind, "stream": error.stream, "reason": error.reason, "action": error.cure}
            return row | {"problem": problem}

    def identity(self, index: int) -> Row:
        """What a row is about; a row of an earlier run with the same is as good as a new one."""
        part = self.parts[index]
        found = _status(part)
        tokens = None
        if self.loader is not None:
            processing = self.loader.preprocessor
            sizes = processing.video_size, processing.total_pixels, processing.image_size
            tokens = [str(processing.rules), *sizes]
        asked = [*sampling_of(part, self.sampling.frames).values(), self.sampling.max_seconds]
        return {
            "path": str(part.path),
            "kind": part.kind,
            "bytes": found.st_size if found else None,
            "changed": found.st_mtime_ns if found else None,
            "asked": [*asked, self.decode, tokens, _LOOK],
        }

    def look(self, part: MediaPart) -> Row:
        """Content, notes and size in tokens of one file.

        Raises:
            MediaError: it cannot be used.
        """
        if part.kind == "image":
            height, width = read_image(part.path).shape[:2]
            _check_shape(part, height, width)
            run = None if self.loader is None else self.loader.load_part(part).run
            return {"width": width, "height": height, "run": None if run is None else asdict(run)}
        sampling, video = sampling_of(part, self.sampling.frames), part.kind == "video"
        info = self.reader.probe(part.path, video=video, **sampling)
        if not video and info.audio is None:
            raise MediaError(str(part.path), "audio", "no_stream", "there is no sound")
        if info.video is not None:
            _check_shape(part, info.video.height, info.video.width)
        run = None if self.loader is None else self.loader.size(info)
        if self.decode and self.loader is not None:
            run = self.loader.load_part(part).run
        elif self.decode:
            limit = self.sampling.max_seconds
            self.reader.read(part.path, max_seconds=limit, video=video, **sampling)
        return {**asdict(info), "notes": self.notes(part, info), "run": None if run is None else asdict(run)}

    def notes(self, part: MediaPart, info: MediaInfo) -> list[Row]:
        """What is usable but may surprise."""
        found = []
        if info.video is not None:
            sampling = sampling_of(part, self.sampling.frames)
            # A frame less, because evenly spread frames come in pairs.
            capped = sampling["max_frames"] is not None and info.video.sampled >= sampling["max_frames"] - 1
            if capped and info.video.seconds_per_frame > 1.01 / sampling["fps"]:
                every = f"read every {info.video.seconds_per_frame:.2g} s"
                found.append(note("thinned", every, "raise max_frames to see more"))
            if info.video.rotation:
                text = f"stored turned by {info.video.rotation} degrees"
                found.append(note("rotated", text, "none, it is turned back"))
            if info.audio is None:
                found.append(note("silent", "there is no sound", "none, a silent video is a valid sample"))
        if info.audio is not None:
            limit = self.sampling.max_seconds
            if info.audio.seconds > limit:
                text = f"{info.audio.seconds:.1f} s of sound are cut to {limit:g} s"
                found.append(note("long_sound", text, "raise data.audio.max_seconds to hear more"))
            if info.audio.start > _LATE_SECONDS:
                text = f"the sound starts at {info.audio.start:.2f} s"
                found.append(note("late_sound", text, "none, silence is put before it"))
        return found


def _status(part: MediaPart) -> os.stat_result | None:
    """Of a file; None if there is none, or a path that the system refuses."""
    try:
        found = os.stat(part.path)
    except (OSError, ValueError):
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _check_shape(part: MediaPart, height: int, width: int) -> None:
    if max(height, width) > _WIDEST * min(height, width):
        reason = f"{width} x {height} pixels: one side is more than {_WIDEST} times the other"
        raise MediaError(str(part.path), part.kind, "unusable", reason)


def note(kind: str, text: str, action: str) -> Row:
    """One remark."""
    return {"kind": kind, "reason": text, "action": action}


def identity_of(row: Mapping[str, Any]) -> str:
    """A row's identity as text."""
    return json.dumps([row[name] for name in ("path", "kind", "bytes", "changed", "asked")])


def size_of(row: Row) -> Run | None:
    """Size in tokens of a file, from its row; None if it is broken."""
    if row["problem"] is not None:
        return None
    run = row["run"]
    if "grid" in run:
        run = {**run, "grid": tuple(run["grid"])}
    return _RUNS[row["kind"]](**run)
