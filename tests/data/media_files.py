"""Small media files of every kind, written with PyAV.

Every frame is uniform grey with the value `frame_level(k)`, so that a test can read off which frame it got;
the first rows are white, which tells rotation. The sound is a tone, so that a test can find where it starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT = 112, 56
TONE_HZ = 500.0
FAULTS = {
    "missing": "missing", "empty": "empty", "text": "not_media", "html": "not_media", "no_index": "truncated",
    "half": "truncated", "noise": "corrupt", "no_video": "no_stream",
}  # fmt: skip
"""What can be wrong with a video file, and the kind of error that it gives."""


@dataclass(frozen=True)
class MediaSpec:
    """What is in a file.

    Attributes:
        seconds: length of the video; 0 for no video stream.
        rate: frames per second.
        audio_seconds: length of the sound; the video's when None; 0 for no audio stream.
        audio_start: seconds of nothing before the first audio packet.
        sample_rate, channels: of the sound.
        video_codec, audio_codec: encoder names.
        rotation: counter-clockwise display rotation in degrees.
        options: muxer options.
        width, height: of the frames, as stored.
    """

    seconds: float = 4.0
    rate: int = 10
    audio_seconds: float | None = None
    audio_start: float = 0.0
    sample_rate: int = 16_000
    channels: int = 1
    video_codec: str = "libx264"
    audio_codec: str = "aac"
    rotation: int = 0
    options: tuple[tuple[str, str], ...] = ()
    width: int = WIDTH
    height: int = HEIGHT


def frame_level(index: int) -> int:
    """Grey level of frame `index`; neighbours differ by far more than a codec's error."""
    return 20 + (index * 37) % 200


def draw_frame(index: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    image = np.full((height, width, 3), frame_level(index), dtype=np.uint8)
    image[: height // 7] = 255
    return image


def write_media(path: Path, spec: MediaSpec) -> Path:
    """Write one file; the container follows from the suffix."""
    audio_seconds = spec.seconds if spec.audio_seconds is None else spec.audio_seconds
    with av.open(str(path), "w", options=dict(spec.options)) as container:
        video = _add_video(container, spec) if spec.seconds else None
        audio = _add_audio(container, spec) if audio_seconds else None
        if video is not None:
            _encode_video(container, video, spec)
        if audio is not None:
            _encode_audio(container, audio, spec, audio_seconds)
    return path


def write_faulty(path: Path, fault: str) -> Path:
    """A path with one of `FAULTS`."""
    path.unlink(missing_ok=True)
    if fault == "no_video":
        return write_media(path, MediaSpec(seconds=0.0, audio_seconds=2.0))
    if fault in ("no_index", "half"):
        options = (("movflags", "faststart"),) if fault == "half" else ()
        content = write_media(path, MediaSpec(options=options)).read_bytes()
        path.write_bytes(content[: len(content) * (5 if fault == "half" else 6) // 10])
    elif fault != "missing":
        text = {"empty": b"", "text": b"This is not a video.\n" * 20, "html": b"<!DOCTYPE html><html>404</html>"}
        path.write_bytes(text[fault] if fault in text else np.random.default_rng(0).bytes(20_000))
    return path


def tone(seconds: float, sample_rate: int) -> np.ndarray:
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    return (0.5 * np.sin(2 * np.pi * TONE_HZ * time)).astype(np.float32)


def _add_video(container: av.container.OutputContainer, spec: MediaSpec) -> av.VideoStream:
    stream = container.add_stream(spec.video_codec, rate=spec.rate)
    stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, "yuv420p"
    if spec.rotation:
        stream.set_display_rotation(spec.rotation)
    stream.options = {
        "libx264": {"preset": "ultrafast", "crf": "12", "g": "20"},
        "libsvtav1": {"preset": "12", "crf": "20"},
        "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "15"},
    }.get(spec.video_codec, {})
    return stream


def _add_audio(container: av.container.OutputContainer, spec: MediaSpec) -> av.AudioStream:
    layout = {1: "mono", 2: "stereo"}[spec.channels]
    return container.add_stream(spec.audio_codec, rate=spec.sample_rate, layout=layout)


def _encode_video(container: av.container.OutputContainer, stream: av.VideoStream, spec: MediaSpec) -> None:
    for index in range(round(spec.seconds * spec.rate)):
        frame = av.VideoFrame.from_ndarray(draw_frame(index, spec.width, spec.height), format="rgb24")
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _encode_audio(
    container: av.container.OutputContainer, stream: av.AudioStream, spec: MediaSpec, seconds: float
) -> None:
    wave = np.repeat(tone(seconds, spec.sample_rate)[:, None], spec.channels, axis=1)
    packed = (wave * 32767).astype(np.int16).reshape(1, -1)
    layout = {1: "mono", 2: "stereo"}[spec.channels]
    start = round(spec.audio_start * spec.sample_rate)
    for first in range(0, len(wave), 960):
        block = packed[:, first * spec.channels : (first + 960) * spec.channels]
        frame = av.AudioFrame.from_ndarray(block, format="s16", layout=layout)
        frame.sample_rate, frame.pts = spec.sample_rate, start + first
        frame.time_base = Fraction(1, spec.sample_rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
