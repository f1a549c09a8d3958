"""Media files to frames and waveforms, decoded in a child process with a wall-clock limit.

PyAV decodes. Each frame is proven to be the one that was asked for: either it came back with the time stamp that the
container gives it, or everything was decoded from the start, where containers state no reliable times (AVI, MPEG-TS) or
something is damaged, and the last frame that is not later was taken, as a player does. Sound is the mean of its
channels, resampled. The clip's clock starts where its first stream starts. What a file gives:

| file | result |
|---|---|
| silent video | frames; `audio` is None |
| sound shorter or longer than the video | both as they are |
| sound that starts late, or has holes | silence in their place |
| sound longer than `max_seconds` | cut there; logged with the number of files cut so far |
| an audio stream without packets | `audio` is None |
| rotated by a display matrix, or EXIF | frames upright |
| cut without re-encoding | from the first frame that the container shows; what it hides is decoded, not returned |
| the opening frames refer to what was cut away | "corrupt" |
| joined files, whose clock goes back | "corrupt"; sound alone is read |
| transparent frames | on white |
| several sound or picture tracks | the default one, as players take it; logged once for each file |
| a playlist, or whatever else names other files | "not_media"; nothing that a file names is opened |
| 0.3 s | at least one frame (a temporal patch is filled by repeating the last frame, see `preprocess`) |
| more frames than `max_frames` | spread evenly; `seconds_per_frame` is the real one |
| frame rate that changes | "steps" go by time; "even" by index, at the average rate |
| file that is not there, a folder, a path that the system refuses | `MediaError`, kind "missing" |
| 0 bytes | "empty" |
| text or something else under a media suffix | "not_media" |
| mp4 whose index is cut off, or less than 90 % of the declared duration present | "truncated" |
| at least 90 % of the declared duration present | what is there |
| headers damaged, more than 10 % of the packets undecodable, or none of the sound | "corrupt" |
| isolated damage inside frames | the decoder's concealment |
| no stream of the wanted sort | "no_stream" (sound of a silent video is None instead) |
| decoding takes longer than the limit | "timeout"; the child is killed and replaced |
| the decoder dies | "crashed"; the child is replaced |
| what the model's processor refuses, as an aspect ratio above 200 | "unusable", with what it said |
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import select
import stat
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio

from omnisieve.data.errors import DataError, SampleError, described, shortened
from omnisieve.data.protocol import Placement

logger = logging.getLogger(__name__)

SAMPLING_RATE = 16_000
_LIKE_SOXR_HQ: dict[str, Any] = {
    "lowpass_filter_width": 68, "rolloff": 0.956, "resampling_method": "sinc_interp_kaiser", "beta": 8.0,
}  # fmt: skip
_RECYCLE_AFTER = 500
_START_SECONDS = 60.0
# The child finds libraries where this process found them, whatever put them on the path here.
_BOOT = (
    "import json, runpy, sys; script, path = sys.argv[1:]; sys.path[:] = json.loads(path); "
    "runpy.run_path(script, run_name='__main__')"
)

_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"v=0", b"[playlist]", b"[Reference]", b"<asx", b"<ASX", b"<smil")

_CURES = {
    "missing": "check the path in the manifest; relative paths are relative to the manifest's folder",
    "empty": "copy or download the file again",
    "not_media": "point to the media file itself; the suffix does not matter, the content does",
    "truncated": "copy or download the file again",
    "corrupt": "re-encode it (ffmpeg -i IN OUT.mp4) or take it out of the manifest",
    "no_stream": "use a file that has such a stream, or give this one as another type of media part",
    "timeout": "raise decode_seconds, lower fps or max_frames, or re-encode the file",
    "crashed": "re-encode it (ffmpeg -i IN OUT.mp4) or take it out of the manifest",
    "memory": "lower fps or max_frames, or scale the video down",
    "animated": "give a GIF or APNG as a video, save others as mp4, or save the picture that is meant",
    "unusable": "scale, crop or convert it to what the model's processor takes, or take it out of the manifest",
}


class MediaError(SampleError):
    """A media file that cannot be used.

    Attributes:
        file: its path. stream: "video", "audio", "image" or "container".
        kind: a row of the module's table or of that of `images`. reason: what is wrong. cure: what to do about it.
    """

    def __init__(self, file: str, stream: str, kind: str, reason: str) -> None:
        super().__init__(file, kind, reason, _CURES[kind])
        self.stream = stream
        self.args = file, stream, kind, reason  # what a copy in another process is made from

    def __str__(self) -> str:
        return f"{shortened(self.file)}: {self.stream}: {self.reason} ({self.kind}). Cure: {self.cure}."


@dataclass(frozen=True)
class VideoFrames:
    """Frames of a clip.

    Attributes:
        frames: uint8 [F, H, W, 3], upright RGB.
        seconds_per_frame: distance of two frames; 1 / fps if the protocol goes by steps and no cap spread them out.
        duration: seconds of the whole video.
    """

    frames: np.ndarray
    seconds_per_frame: float
    duration: float


@dataclass(frozen=True)
class Clip:
    """What was read of a file: `video` if asked for, `audio` float32 [samples] at 16 kHz if it has sound.

    Sound is the mean of all channels, as `librosa.load` gives it.
    """

    video: VideoFrames | None
    audio: np.ndarray | None


@dataclass(frozen=True)
class VideoInfo:
    """A video stream.

    Attributes:
        seconds, frames: of the whole stream. width, height: of upright frames. rotation: in degrees, as stored.
        sampled: frames that would be read. seconds_per_frame: their distance.
    """

    seconds: float
    frames: int
    width: int
    height: int
    rotation: int
    sampled: int
    seconds_per_frame: float


@dataclass(frozen=True)
class AudioInfo:
    """An audio stream: where on the clip's clock it starts and ends, Hz, channels."""

    seconds: float
    start: float
    rate: int
    channels: int


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds: its streams as "video/h264", the video if it was asked for, the sound if there is any."""

    streams: tuple[str, ...]
    video: VideoInfo | None
    audio: AudioInfo | None


class MediaReader:
    """Decodes in a child process that lives until it hangs, dies, or has served 500 files.

    Safe to create before a `DataLoader` starts its workers, and to use inside them: each process starts a
    child of its own on first use. Not safe for several threads at once.
    """

    def __init__(self, *, decode_seconds: float = 60.0) -> None:
        """`decode_seconds`: wall-clock limit for one file."""
        if decode_seconds <= 0:
            raise ValueError(f"decode_seconds must be positive, got {decode_seconds}")
        self.decode_seconds = decode_seconds
        self.truncated = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._served = 0
        self._told: set[tuple[str, str]] = set()

    def read(
        self,
        path: str | Path,
        *,
        fps: float = 2.0,
        min_frames: int = 1,
        max_frames: int | None = None,
        placement: Placement = "steps",
        max_seconds: float | None = None,
        audio_track: int | None = None,
        video: bool = True,
    ) -> Clip:
        """Read one file.

        Args:
            path: mp4, webm, mkv, or anything else FFmpeg decodes.
            fps: frames per second of the result.
            min_frames, max_frames: at least and at most so many; see `protocol.Protocol`.
            placement: which frames; see `protocol.Protocol`.
            max_seconds: sound beyond is cut off.
            audio_track: which of the file's sound tracks, counted from 0; default: the one that players take.
            video: whether frames are wanted; sound comes if there is any.

        Raises:
            MediaError: see the table above. DataError: no decoding process can be started.
        """
        answer, arrays = self._request(
            path, fps=float(fps), min_frames=min_frames, max_frames=max_frames, placement=placement,
            max_seconds=max_seconds, track=audio_track, video=video, probe=False,
        )  # fmt: skip
        frames = VideoFrames(arrays.pop(0), **answer["video"]) if video else None
        wave = None
        if "audio" in answer:
            wave = _resample(arrays.pop(0), answer["audio"]["rate"])
            self._report_cut(path, answer["audio"]["seconds"], max_seconds)
        return Clip(frames, wave)

    def probe(
        self,
        path: str | Path,
        *,
        fps: float = 2.0,
        min_frames: int = 1,
        max_frames: int | None = None,
        placement: Placement = "steps",
        audio_track: int | None = None,
        video: bool = True,
    ) -> MediaInfo:
        """Look at a file's packets and its first frame, and at nothing else; arguments as for `read`.

        Raises:
            MediaError: the file cannot be used. Damage inside the streams is found by `read` only.
        """
        answer, _ = self._request(
            path, fps=float(fps), min_frames=min_frames, max_frames=max_frames, placement=placement,
            track=audio_track, video=video, probe=True,
        )  # fmt: skip
        return MediaInfo(
            tuple(answer["streams"]),
            None if answer["video"] is None else VideoInfo(**answer["video"]),
            None if answer["audio"] is None else AudioInfo(**answer["audio"]),
        )

    def close(self) -> None:
        """End the child, if there is one and it is ours."""
        child, self._child = self._child, None
        if child is None:
            return
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        if self._owner == os.getpid():
            child.kill()
            child.wait()
        else:
            child.returncode = 0  # another process's child: not ours to wait for

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_child": None}

    def __del__(self) -> None:
        if getattr(self, "_child", None) is not None and not sys.is_finalizing():
            self.close()

    def _request(self, path: str | Path, **options: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
        check_file(path)
        # The child stays in the folder where it was started.
        answer, arrays = self._ask({"path": os.path.abspath(path), "seconds": self.decode_seconds, **options})
        if "failure" in answer:
            kind, stream, reason = answer["failure"]
            raise MediaError(str(path), stream, *_refine(path, kind, reason))
        for note in answer["notes"]:
            self._tell_once(path, note)
        return answer, arrays

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
        if self._child is not None and (self._owner != os.getpid() or self._served >= _RECYCLE_AFTER):
            self.close()
        child = self._child or self._start()
        deadline = time.monotonic() + self.decode_seconds
        self._served += 1
        payload = pickle.dumps(request)
        try:
            os.write(child.stdin.fileno(), struct.pack("<q", len(payload)) + payload)  # type: ignore[union-attr]
            size = struct.unpack("<q", self._receive(8, deadline))[0]
            answer = pickle.loads(self._receive(size, deadline))
            arrays = []
            for dtype, shape in answer["arrays"]:
                array = np.empty(shape, dtype=dtype)
                self._receive_into(array.reshape(-1).data.cast("B"), deadline)
                arrays.append(array)
            return answer, arrays
        except TimeoutError as error:
            self.close()
            reason = f"not decoded within {self.decode_seconds:g} s"
            raise MediaError(request["path"], "container", "timeout", reason) from error
        except (EOFError, BrokenPipeError) as error:
            code = child.wait(timeout=5)
            self.close()
            reason = f"the decoding process died (exit status {code})"
            raise MediaError(request["path"], "container", "crashed", reason) from error

    def _start(self) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("_decoder.py")
        self._child = subprocess.Popen(
            [sys.executable, "-c", _BOOT, str(script), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self._owner, self._served = os.getpid(), 0
        try:
            self._receive(1, time.monotonic() + _START_SECONDS)
        except (TimeoutError, EOFError) as error:
            self.close()
            cure = f"see what '{sys.executable} -c \"import av, numpy\"' says"
            raise DataError(f"the decoding process did not start: {cure}") from error
        return self._child

    def _receive(self, size: int, deadline: float) -> bytearray:
        data = bytearray(size)
        self._receive_into(memoryview(data), deadline)
        return data

    def _receive_into(self, view: memoryview, deadline: float) -> None:
        pipe = self._child.stdout if self._child else None
        if pipe is None:
            raise EOFError
        done = 0
        while done < len(view):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise TimeoutError
            count = pipe.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise EOFError
            done += count

    def _tell_once(self, path: str | Path, note: str) -> None:
        if (str(path), note) not in self._told:
            self._told.add((str(path), note))
            logger.warning("%s: %s", path, note)

    def _report_cut(self, path: str | Path, seconds: float, max_seconds: float | None) -> None:
        if max_seconds is None or seconds <= max_seconds + 0.1:
            return
        self.truncated += 1
        # The first one and then ever fewer, so that a long run's log stays readable.
        if self.truncated & (self.truncated - 1) == 0:
            logger.warning(
                "%s: %.1f s of sound cut to %g s (audio.max_seconds); %d file(s) cut so far",
                path, seconds, max_seconds, self.truncated,
            )  # fmt: skip


def _resample(wave: np.ndarray, rate: int) -> np.ndarray:
    """At 16 kHz, by a filter that was fitted to the soxr HQ of `librosa.load`, with which models were trained.

    On recorded speech, music and noise, log-mel spectrograms differ from soxr's by 0.012 at most and 0.0002 on average;
    with torchaudio's default filter by 0.7 and 0.005, in the highest bins.
    """
    if rate == SAMPLING_RATE:
        return wave
    return torchaudio.functional.resample(torch.from_numpy(wave), rate, SAMPLING_RATE, **_LIKE_SOXR_HQ).numpy()


def check_file(path: str | Path) -> None:
    """Refuse what needs no decoding to be refused.

    Raises:
        MediaError: there is no such file, the system refuses its path, it is a folder, or it is empty.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MediaError(str(path), "container", "missing", "there is no such file") from error
    except (OSError, ValueError) as error:  # too long, unreadable, or with a character that no path has
        raise MediaError(str(path), "container", "missing", f"the system says {described(error)}") from error
    if not stat.S_ISREG(found.st_mode):
        reason = "is a folder" if stat.S_ISDIR(found.st_mode) else "is no ordinary file"
        raise MediaError(str(path), "container", "missing", reason)
    if found.st_size == 0:
        raise MediaError(str(path), "container", "empty", "the file has 0 bytes")


def _refine(path: str | Path, kind: str, reason: str) -> tuple[str, str]:
    """Tell a damaged container from a cut one and from something that never was one, by its first bytes."""
    if kind not in ("corrupt", "no_stream"):
        return kind, reason
    with open(path, "rb") as file:
        head = file.read(4096)
    if b"\0" not in head and sum(byte in b"\t\n\r" or byte >= 32 for byte in head) == len(head):
        if head.lstrip(b"\xef\xbb\xbf \r\n").startswith(_PLAYLISTS) or b"<MPD" in head:
            return "not_media", "a playlist: it names other files or addresses, which are never opened"
        return "not_media", "the content is text"
    if kind == "corrupt" and head[4:8] == b"ftyp" and not _has_box(path, b"moov"):
        return "truncated", "the index (moov) at the end of the file is missing"
    return kind, reason


def _has_box(path: str | Path, name: bytes) -> bool:
    """Whether an mp4 file has a top-level box of this name, in full."""
    size = Path(path).stat().st_size
    position = 0
    with open(path, "rb") as file:
        while position + 8 <= size:
            file.seek(position)
            length, kind = struct.unpack(">I4s", file.read(8))
            if length == 1:
                length = struct.unpack(">Q", file.read(8).ljust(8, b"\0"))[0]
            length = length or size - position
            if kind == name:
                return position + length <= size
            if length < 8:
                return False
            position += length
    return False
