"""Media files whose frames and seconds can be told: bars of light are a frame's number, a second's tone is its pitch.

    python -m tests.data.numbered_media FOLDER

writes one file for each of `CASES`: containers, codecs, frames stored out of order, open and closed groups of pictures,
cuts without re-encoding, clocks that do not start at 0, several tracks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, BITS = 160, 96, 10
SAMPLING_RATE = 16_000
_BARS = slice(HEIGHT * 5 // 8, HEIGHT * 7 // 8)


@dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        name: its file name; the suffix chooses the container.
        codec, options: of the video encoder.
        rate, seconds: frames per second, length.
        muxer: options of the container.
        times: presentation times of the frames in frames, where the rate is not constant.
        cut: seconds that are cut off at the front without re-encoding. The container hides what it needs from before.
        at_key: whether a cut file begins with a key frame; else with whatever packet comes next.
        offset: seconds that its clock starts with.
        sound: codec of the sound; None for none.
        tracks: factor of the pitch of each sound track.
        default: which track is marked as the one to play.
    """

    name: str
    codec: str = "libx264"
    options: tuple[tuple[str, str], ...] = ()
    rate: int = 20
    seconds: float = 4.0
    muxer: tuple[tuple[str, str], ...] = ()
    times: tuple[int, ...] | None = None
    cut: float = 0.0
    at_key: bool = True
    offset: float = 0.0
    sound: str | None = None
    tracks: tuple[float, ...] = (1.0,)
    default: int = 0


def _x264(**options: str) -> tuple[tuple[str, str], ...]:
    return (("preset", "veryfast"), ("g", "25"), *options.items())


_X265 = (("preset", "ultrafast"),)
CLOSED, STRAIGHT = _x264(bf="3"), _x264(bf="0")
OPEN = (("preset", "veryfast"), ("x264-params", "open-gop=1:keyint=25:bframes=3"))
REFRESH = (("preset", "veryfast"), ("x264-params", "intra-refresh=1:keyint=25"))
HEVC = (*_X265, ("x265-params", "keyint=25:open-gop=0:bframes=3:log-level=none"))
HEVC_OPEN = (*_X265, ("x265-params", "keyint=25:open-gop=1:bframes=3:log-level=none"))
HEVC_STRAIGHT = (*_X265, ("x265-params", "keyint=25:bframes=0:log-level=none"))
AV1 = (("preset", "12"), ("g", "25"))
OLD, OLD_STRAIGHT = (("g", "15"), ("bf", "2"), ("q", "4")), (("g", "15"), ("bf", "0"), ("q", "4"))
VP8 = (("g", "25"), ("auto-alt-ref", "1"), ("lag-in-frames", "10"), ("deadline", "good"), ("cpu-used", "5"))
VP9 = (("g", "25"), ("auto-alt-ref", "1"), ("lag-in-frames", "10"), ("deadline", "realtime"), ("cpu-used", "8"))
FRAGMENTS = (("movflags", "frag_keyframe+empty_moov"),)
UNEVEN = tuple(9 * (k // 5) + (0, 1, 3, 4, 7)[k % 5] for k in range(100))

CASES = (
    Case("straight.mp4", options=STRAIGHT, sound="aac"),
    Case("closed.mp4", options=CLOSED, sound="aac"),
    Case("open.mp4", options=OPEN),
    Case("refresh.mp4", options=REFRESH),
    Case("fragments.mp4", options=CLOSED, muxer=FRAGMENTS, sound="aac"),
    Case("straight_fragments.mp4", options=STRAIGHT, muxer=FRAGMENTS),
    Case("index_first.mp4", options=STRAIGHT, muxer=(("movflags", "faststart"),)),
    Case("uneven.mp4", options=STRAIGHT, times=UNEVEN),
    Case("uneven_closed.mp4", options=CLOSED, times=UNEVEN),
    Case("single_group.mp4", options=(("preset", "veryfast"), ("g", "999"), ("bf", "0"))),
    Case("closed.mov", options=CLOSED),
    Case("hevc.mp4", "libx265", HEVC),
    Case("hevc_open.mp4", "libx265", HEVC_OPEN),
    Case("hevc_straight.mp4", "libx265", HEVC_STRAIGHT),
    Case("av1.mp4", "libsvtav1", AV1),
    Case("vp9.mp4", "libvpx-vp9", VP9),
    Case("mpeg4.mp4", "mpeg4", OLD),
    Case("mpeg4_straight.mp4", "mpeg4", OLD_STRAIGHT),
    Case("straight.mkv", options=STRAIGHT),
    Case("closed.mkv", options=CLOSED, sound="libopus"),
    Case("open.mkv", options=OPEN),
    Case("refresh.mkv", options=REFRESH),
    Case("hevc_open.mkv", "libx265", HEVC_OPEN),
    Case("mpeg2.mkv", "mpeg2video", OLD, rate=25),
    Case("mpeg4.mkv", "mpeg4", OLD),
    Case("slow.mkv", options=CLOSED, rate=1, seconds=20),
    Case("uneven.mkv", options=CLOSED, times=UNEVEN),
    Case("vp8.webm", "libvpx", VP8, sound="libopus"),
    Case("vp9.webm", "libvpx-vp9", VP9),
    Case("av1.webm", "libsvtav1", AV1),
    Case("closed.avi", options=CLOSED, sound="libmp3lame"),
    Case("straight.avi", options=STRAIGHT),
    Case("open.avi", options=OPEN),
    Case("mpeg4.avi", "mpeg4", OLD, sound="libmp3lame"),
    Case("mpeg4_straight.avi", "mpeg4", OLD_STRAIGHT),
    Case("mjpeg.avi", "mjpeg", (("q", "4"),)),
    Case("closed.ts", options=CLOSED, sound="aac"),
    Case("open.ts", options=OPEN),
    Case("hevc_open.ts", "libx265", HEVC_OPEN),
    Case("mpeg2.ts", "mpeg2video", OLD, rate=25),
    Case("mpeg2.mpg", "mpeg2video", OLD, rate=25),
    Case("closed.flv", options=CLOSED, sound="aac"),
    Case("sorenson.flv", "flv", (("g", "15"), ("q", "4"))),
    Case("wmv2.wmv", "wmv2", (("g", "15"), ("q", "4"))),
    Case("mpeg4.3gp", "mpeg4", OLD),
    Case("cut.mp4", options=CLOSED, cut=1.7, sound="aac"),
    Case("cut_straight.mp4", options=STRAIGHT, cut=1.7),
    Case("cut_open.mp4", options=OPEN, cut=2.05),
    Case("cut_hevc_open.mp4", "libx265", HEVC_OPEN, cut=1.7),
    Case("cut_av1.mp4", "libsvtav1", AV1, cut=1.7),
    Case("cut_mpeg4.mov", "mpeg4", OLD, cut=1.7),
    Case("cut.mkv", options=CLOSED, cut=1.7),
    Case("cut_between.mkv", options=CLOSED, cut=1.7, at_key=False),
    Case("cut_between.ts", options=CLOSED, cut=1.7, at_key=False),
    Case("cut_between.mp4", options=STRAIGHT, cut=1.7, at_key=False),
    Case("cut_between_mpeg2.ts", "mpeg2video", OLD, rate=25, cut=1.5, at_key=False),
    Case("late.mkv", options=CLOSED, offset=5.3, sound="aac"),
    Case("late_straight.mkv", options=STRAIGHT, offset=1000.0),
    Case("late.webm", "libvpx", VP8, offset=5.3),
    Case("late.mp4", options=CLOSED, offset=5.3),
    Case("late_straight.mp4", options=STRAIGHT, offset=5.3),
    Case("late.ts", options=CLOSED, offset=5.3),
    Case("late.flv", options=CLOSED, offset=5.3),
    Case("second_track.mkv", options=CLOSED, sound="aac", tracks=(1.0, 2.0), default=1),
    Case("first_track.mkv", options=CLOSED, sound="aac", tracks=(1.0, 2.0)),
    Case("second_track.mp4", options=STRAIGHT, sound="aac", tracks=(1.0, 2.0), default=1),
    Case("third_track.mkv", options=CLOSED, sound="libopus", tracks=(1.0, 2.0, 3.0), default=2),
)


def draw(number: int) -> np.ndarray:
    """Frame `number`, uint8 [H, W, 3]: a moving pattern, and its bits as bars."""
    columns, rows = np.arange(WIDTH), np.arange(HEIGHT)[:, None]
    image = np.stack([(columns + shift * number + rows) % 256 for shift in (1, 3, 5)], -1).astype(np.uint8)
    for bit in range(BITS):
        image[_BARS, bit * WIDTH // BITS : (bit + 1) * WIDTH // BITS] = 235 if number >> bit & 1 else 20
    return image


def number_of(image: np.ndarray) -> int:
    """The number that is drawn in a frame [H, W, 3]."""
    light = image[_BARS].mean(axis=(0, 2))
    middles = [(2 * bit + 1) * WIDTH // (2 * BITS) for bit in range(BITS)]
    return sum(1 << bit for bit, middle in enumerate(middles) if light[middle - 3 : middle + 3].mean() > 127)


def pitch(second: int) -> float:
    """Hertz of the tone in that second."""
    return 300.0 + 100.0 * second


def pitches_of(wave: np.ndarray) -> list[float]:
    """Hertz of the strongest tone in the middle of each second of sound at 16 kHz."""
    seconds = [wave[k * SAMPLING_RATE : (k + 1) * SAMPLING_RATE] for k in range(len(wave) // SAMPLING_RATE)]
    return [float(np.abs(np.fft.rfft(second[4000:12000])).argmax() * 2) for second in seconds]


def write(folder: Path, case: Case) -> Path:
    """Write one case; returns its path."""
    path = folder / case.name
    with av.open(str(path), "w", options=dict(case.muxer)) as container:
        for packet in _packets(container, case):
            container.mux(packet)
    return path


def shown(path: Path) -> list[tuple[float, int]]:
    """Time after the file's start and number of each frame: decoded from the start by PyAV alone, sorted by time."""
    with av.open(str(path)) as container:
        start = (container.start_time or 0) / av.time_base
        frames = container.decode(container.streams.video[0])
        return sorted((frame.time - start, number_of(frame.to_ndarray(format="rgb24"))) for frame in frames)


def at(frames: Sequence[tuple[float, int]], wanted: float) -> int:
    """The number that a player shows then: the last frame that is not later, or the first of all."""
    return [number for time, number in frames if time <= wanted + 1e-3 or time == frames[0][0]][-1]


def _packets(container: av.container.OutputContainer, case: Case) -> Iterator[av.Packet]:
    """What to store, in the order of the file."""
    video = container.add_stream(case.codec, rate=case.rate)
    video.width, video.height = WIDTH, HEIGHT
    video.pix_fmt = "yuvj420p" if case.codec == "mjpeg" else "yuv420p"
    video.options = dict(case.options)
    video.thread_count = 1
    sounds = []
    for number in range(len(case.tracks) if case.sound else 0):
        # Opus has a rate of its own.
        sounds.append(container.add_stream(case.sound, rate=48_000 if case.sound == "libopus" else SAMPLING_RATE))
        if len(case.tracks) > 1:
            marked = number == case.default
            sounds[-1].disposition = av.stream.Disposition.default if marked else av.stream.Disposition(0)
    pictures = list(_pictures(video, case))
    keys = [packet.dts for packet in pictures if packet.is_keyframe and packet.pts * packet.time_base <= case.cut]
    packets = [p for p in pictures if p.dts >= keys[-1] and (case.at_key or p.dts * p.time_base >= case.cut)]
    for stream, factor in zip(sounds, case.tracks, strict=False):
        packets += [p for p in _tones(stream, case, factor) if p.pts * p.time_base >= case.cut]
    for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
        shift = round((case.offset - case.cut) / packet.time_base)
        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
        yield packet


def _pictures(stream: av.VideoStream, case: Case) -> Iterator[av.Packet]:
    for number in range(len(case.times) if case.times else round(case.seconds * case.rate)):
        frame = av.VideoFrame.from_ndarray(draw(number), format="rgb24")
        frame.pts, frame.time_base = case.times[number] if case.times else number, Fraction(1, case.rate)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _tones(stream: av.AudioStream, case: Case, factor: float) -> Iterator[av.Packet]:
    rate = stream.rate
    seconds = np.arange(round(case.seconds * rate)) / rate
    hertz = np.array([pitch(int(second)) for second in range(int(case.seconds) + 1)])[seconds.astype(int)] * factor
    wave = (0.4 * np.sin(2 * np.pi * hertz * seconds) * 32767).astype(np.int16)[None]
    for first in range(0, wave.shape[1], 960):
        frame = av.AudioFrame.from_ndarray(wave[:, first : first + 960], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, first, Fraction(1, rate)
        yield from stream.encode(frame)
    yield from stream.encode(None)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for each in CASES:
        print(write(target, each))
