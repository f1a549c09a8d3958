"""The process that decodes: reads requests from stdin, answers on stdout, and may be killed at any time.

`media.MediaReader` runs this file by its path and nothing of ours is imported here, so that a child starts in
a fraction of a second and holds neither torch nor the model libraries. A request is a pickled dictionary
behind its length; an answer is a pickled header behind its length, then the raw bytes of its arrays.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import sys
from fractions import Fraction
from typing import Any, BinaryIO

import av
import numpy as np

try:
    import decord
except ImportError:  # no wheel for this platform: PyAV does everything
    decord = None

DECORD_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "mpeg4"})
"""Video codecs that decord's bundled FFmpeg decodes reliably; AV1 is not among them."""
UNSEEKABLE = frozenset({"mpegts", "mpeg"})
"""Containers without an index: decord miscounts their frames, and seeking in them is a guess."""
DECLARING = frozenset({"mov", "matroska", "avi", "asf", "flv"})
"""Containers that state their duration; elsewhere FFmpeg guesses it from the bit rate."""
MIN_COMPLETE = 0.9
"""Share of the declared duration that must be in the file, and of the packets that must decode."""
READY = b"\1"
FRAME_FACTOR = 2
"""Evenly spread frames come in such groups, the temporal patches of the models."""
_CLOCK_TOLERANCE = 1e-3
_AUDIO_GAP = 0.05


class Failure(Exception):
    """A file that cannot be used: (kind, stream, reason), see `media.MediaError`."""


class Scan:
    """Where the packets of a file are, found without decoding.

    Attributes:
        start: container time that counts as 0 s.
        times: [frames] presentation times of the video frames in seconds after `start`, sorted.
        keys: times of the key frames.
        video_end: end of the last video frame.
        audio: start and end of the sound; None without a packet of it.
    """

    def __init__(self, path: str, video: int | None, audio: int | None = None) -> None:
        times: list[tuple[float, float, bool]] = []
        sound: list[tuple[float, float]] = []
        end = 0.0
        with av.open(path) as container:
            self.start = (container.start_time or 0) / av.time_base
            declared = (container.duration or 0) / av.time_base
            declares = DECLARING & set(container.format.name.split(","))
            for packet in container.demux():
                stamp = packet.pts if packet.pts is not None else packet.dts
                if stamp is None or packet.time_base is None or packet.is_discard:
                    continue
                time = float(stamp * packet.time_base) - self.start
                length = float((packet.duration or 0) * packet.time_base)
                end = max(end, time + length)
                if packet.stream_index == video:
                    times.append((time, length, packet.is_keyframe))
                elif packet.stream_index == audio:
                    sound.append((time, time + length))
        self.audio = (min(first for first, _ in sound), max(last for _, last in sound)) if sound else None
        times.sort()
        self.times = np.array([t for t, _, _ in times])
        self.keys = np.array([t for t, _, key in times if key])
        step = float(np.median(np.diff(self.times))) if len(times) > 1 else 0.0
        self.video_end = times[-1][0] + (times[-1][1] or step or 0.04) if times else 0.0
        # A file without a duration of its own (a live recording) is taken as it is.
        if declares and end < MIN_COMPLETE * declared:
            raise Failure("truncated", "container", f"only {end:.1f} s of the declared {declared:.1f} s are there")


def decode(request: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Decode what a request asks for; see `media.MediaReader.read` for its keys."""
    path = request["path"]
    info: dict[str, Any] = {}
    arrays: list[np.ndarray] = []
    try:
        video, audio, codec, seekable = _streams(path)
        if request["video"] and video is None:
            raise Failure("no_stream", "video", "there is no video stream, only sound")
        scan = Scan(path, video)
        if request["video"] and video is not None:
            if not len(scan.times):
                raise Failure("truncated", "video", "there is not a single frame")
            frames, info["video"] = _video(path, video, scan, request, codec, seekable)
            arrays.append(frames)
        sound = None
        if audio is not None:
            sound = _audio(path, audio, scan, request["max_seconds"])
        if sound is not None:
            arrays.append(sound[0])
            info["audio"] = sound[1]
    except (av.error.FFmpegError, OSError, EOFError) as error:
        raise Failure("corrupt", "container", f"FFmpeg says: {error}") from error
    return info, arrays


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """What a file holds, from its packets and its first frame; see `media.MediaReader.probe`."""
    path = request["path"]
    info: dict[str, Any] = {"video": None, "audio": None}
    try:
        video, audio, _, _ = _streams(path)
        if request["video"] and video is None:
            raise Failure("no_stream", "video", "there is no video stream, only sound")
        scan = Scan(path, video, audio)
        with av.open(path) as container:
            info["streams"] = [f"{stream.type}/{_codec(stream)}" for stream in container.streams]
            if video is not None and request["video"]:
                if not len(scan.times):
                    raise Failure("truncated", "video", "there is not a single frame")
                info["video"] = _probe_video(container, video, scan, request)
            if audio is not None and scan.audio is not None:
                stream = next(s for s in container.streams.audio if s.index == audio)
                start, end = scan.audio
                end = min(end, _declared_end(stream, scan.start) or end)
                info["audio"] = {"seconds": end, "start": max(start, 0.0), "rate": stream.rate,
                                 "channels": stream.channels}  # fmt: skip
    except (av.error.FFmpegError, OSError, EOFError) as error:
        raise Failure("corrupt", "container", f"FFmpeg says: {error}") from error
    return info


def _probe_video(
    container: av.container.InputContainer, index: int, scan: Scan, request: dict[str, Any]
) -> dict[str, Any]:
    stream = next(s for s in container.streams.video if s.index == index)
    try:
        frame = next(container.decode(stream))
    except (av.error.InvalidDataError, StopIteration) as error:
        raise Failure("corrupt", "video", "the first frame does not decode") from error
    turned = round(frame.rotation / 90) % 2
    picks, step = _choose(scan, stream.average_rate, request)
    return {
        "seconds": scan.video_end, "frames": len(scan.times), "rotation": frame.rotation % 360,
        "width": frame.height if turned else frame.width, "height": frame.width if turned else frame.height,
        "sampled": len(picks), "seconds_per_frame": step,
    }  # fmt: skip


def _codec(stream: Any) -> str:
    return stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"


def _streams(path: str) -> tuple[int | None, int | None, str, bool]:
    """Indices of the first video and audio streams (a cover picture is no video), the codec, seekability."""
    with av.open(path) as container:
        pictures = av.stream.Disposition.attached_pic
        videos = [s for s in container.streams.video if not s.disposition & pictures]
        audios = list(container.streams.audio)
        codec = videos[0].codec_context.codec.canonical_name if videos and videos[0].codec_context else ""
        if not videos and not audios:
            raise Failure("no_stream", "container", "there is neither a video nor an audio stream")
        video, audio = (streams[0].index if streams else None for streams in (videos, audios))
        return video, audio, codec, not UNSEEKABLE & set(container.format.name.split(","))


def _video(
    path: str, index: int, scan: Scan, request: dict[str, Any], codec: str, seekable: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames at the wanted rate, uint8 [F, H, W, 3], and their clock."""
    with av.open(path) as container:
        rate = next(s for s in container.streams.video if s.index == index).average_rate
    picks, step = _choose(scan, rate, request)
    frames = _by_decord(path, picks, len(scan.times)) if codec in DECORD_CODECS and seekable else None
    backend = "decord" if frames is not None else "pyav"
    if frames is None:
        frames = _by_pyav(path, index, scan, picks, seekable)
    return frames, {"seconds_per_frame": step, "duration": scan.video_end, "backend": backend}


def _choose(scan: Scan, rate: Fraction | None, request: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Indices of the frames to take of a video, [F], and seconds between two of them.

    Args:
        scan: of the file.
        rate: average frames per second that the stream states, if it does.
        request: `placement`, `fps`, `min_frames`, `max_frames`.
    """
    fps, max_frames = request["fps"], request["max_frames"]
    if request["placement"] == "even":
        rate_or_mean = float(rate or 0) or len(scan.times) / scan.video_end
        return spread(len(scan.times), rate_or_mean, fps, request["min_frames"], max_frames)
    count, step = _steps(scan.video_end, fps, max_frames)
    wanted = np.arange(count) * step
    picks = np.searchsorted(scan.times, wanted + _CLOCK_TOLERANCE, side="right") - 1
    return picks.clip(0), step


def _steps(end: float, fps: float, max_frames: int | None) -> tuple[int, float]:
    """How many frames to take of a video that ends there, and seconds between two of them."""
    count = max(int(end * fps + 0.5), 1)
    if max_frames is not None and count > max_frames:
        return max_frames, end / max_frames
    return count, 1.0 / fps


def spread(total: int, rate: float, fps: float, min_frames: int, max_frames: int | None) -> tuple[np.ndarray, float]:
    """Frames as `smart_nframes` and `_read_video_decord` of qwen_omni_utils 0.0.9 choose them.

    An even number of them, from the first frame to the last, by index: where the frame rate of a file changes, the
    distance is that at its average rate. Of a file of one frame, which qwen_omni_utils refuses, that one.

    Args:
        total: frames of the file.
        rate: its average frames per second.
        fps, min_frames, max_frames: as for `media.MediaReader.read`.

    Returns:
        indices [F], and seconds between two frames.
    """
    least = -(-min_frames // FRAME_FACTOR) * FRAME_FACTOR
    most = (total if max_frames is None else max_frames) // FRAME_FACTOR * FRAME_FACTOR
    count = int(min(max(total / rate * fps, least), most, total)) // FRAME_FACTOR * FRAME_FACTOR
    # A manifest may ask for a single frame, but a temporal patch has two in any case.
    count = max(count, min(total, FRAME_FACTOR))
    return _linspace(total - 1, count), 1 / (count / total * rate)


def _linspace(last: int, count: int) -> np.ndarray:
    """`torch.linspace(0, last, count).round().long()`, to the bit: float32, and the second half counted from the end.

    What torch fuses into one rounding on CPUs with AVX2 or AVX-512 is one rounding from float64 here.
    """
    index = np.arange(count)
    step = np.float64(np.float32(last) / np.float32(max(count - 1, 1)))
    places = np.where(index < count // 2, step * index, last - step * (count - 1 - index))
    return np.rint(places.astype(np.float32)).astype(np.int64)


def _by_decord(path: str, picks: np.ndarray, frames: int) -> np.ndarray | None:
    """Frames by index, rotated by decord itself; None where it fails or counts other frames than are there."""
    if decord is None:
        return None
    try:
        reader = decord.VideoReader(path, num_threads=1)
        # decord is known to spin forever on containers that promise more frames than they hold.
        if len(reader) != frames:
            return None
        return reader.get_batch(picks).asnumpy()
    except (decord.DECORDError, RuntimeError):
        return None


def _by_pyav(path: str, index: int, scan: Scan, picks: np.ndarray, seekable: bool) -> np.ndarray:
    """Frames by index through PyAV, jumping over groups of pictures without a wanted frame; rotated here."""
    wanted = scan.times[picks]
    keys = scan.keys if seekable and len(scan.keys) else scan.times[:1]
    group = np.searchsorted(keys, wanted + _CLOCK_TOLERANCE, side="right") - 1
    out: list[np.ndarray] = []
    packets = errors = 0
    with av.open(path) as container:
        stream = next(s for s in container.streams.video if s.index == index)
        stream.thread_count = 1
        for number in np.unique(group.clip(0)):
            targets = list(wanted[group.clip(0) == number])
            if seekable:
                ticks = (keys[number] + scan.start) / float(stream.time_base or 1)
                container.seek(round(ticks), stream=stream)
            shown: av.VideoFrame | None = None
            for packet in container.demux(stream):
                packets += 1
                try:
                    decoded = stream.decode(packet)
                except av.error.InvalidDataError:
                    errors += 1
                    continue
                for frame in decoded:
                    time = (frame.time or 0.0) - scan.start
                    while targets and shown is not None and time > targets[0] + _CLOCK_TOLERANCE:
                        out.append(_picture(shown, out))
                        targets.pop(0)
                    shown = frame
                if not targets:
                    break
            if shown is not None:
                out += [_picture(shown, out) for _ in targets]
    if errors > (1 - MIN_COMPLETE) * packets or len(out) < len(picks):
        raise Failure("corrupt", "video", f"{errors} of {packets} packets do not decode")
    return np.stack(out)


def _picture(frame: av.VideoFrame, before: list[np.ndarray]) -> np.ndarray:
    """One frame upright as uint8 [H, W, 3], in the size of those before it."""
    turns = round(frame.rotation / 90) % 4
    height, width = before[0].shape[:2] if before else (0, 0)
    if turns % 2:
        height, width = width, height
    stored = frame.reformat(format="rgb24", width=width or None, height=height or None).to_ndarray()
    return np.ascontiguousarray(np.rot90(stored, turns))


def _audio(path: str, index: int, scan: Scan, max_seconds: float | None) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Mean of the channels, float32 [samples] at the file's own rate, on the clip's clock; None if it is empty."""
    pieces: list[np.ndarray] = []
    written = packets = errors = 0
    with av.open(path) as container:
        stream = next(s for s in container.streams.audio if s.index == index)
        rate, length = stream.rate, (container.duration or 0) / av.time_base
        # Only to float32: what FFmpeg makes of several channels is louder than their mean. Not planar, because PyAV
        # reads beyond the planes of eight channels.
        packed = av.AudioResampler(format="flt", rate=rate)
        limit = None if max_seconds is None else round(max_seconds * rate)
        declared = _declared_end(stream, scan.start)
        for packet in container.demux(stream):
            packets += packet.size > 0
            try:
                decoded = stream.decode(packet)
            except av.error.InvalidDataError:
                errors += 1
                continue
            for frame in decoded:
                gap = (frame.time or 0.0) - scan.start - written / rate
                # A late start, or a hole in a recording, is silence; a stamp past the file's end is a lie.
                if _AUDIO_GAP < gap < length:
                    pieces.append(np.zeros(round(gap * rate), dtype=np.float32))
                    written += len(pieces[-1])
                for part in packed.resample(frame):
                    channels = part.to_ndarray().reshape(-1, part.layout.nb_channels)
                    pieces.append(channels.mean(axis=1, dtype=np.float32))
                    written += len(pieces[-1])
            if limit is not None and written > limit + rate:
                break
    if errors > (1 - MIN_COMPLETE) * packets or (packets and not written):
        raise Failure("corrupt", "audio", f"{errors or packets} of {packets} packets do not decode")
    if not written:
        return None
    wave = np.concatenate(pieces)
    # An encoder fills its last block; what lies past the declared end is not sound of the recording.
    if declared is not None and 0 < len(wave) - declared * rate < 0.1 * rate:
        wave = wave[: round(declared * rate)]
    return wave[:limit], {"rate": rate, "seconds": max(declared or 0.0, len(wave) / rate)}


def _declared_end(stream: av.AudioStream, start: float) -> float | None:
    if stream.duration is None or stream.time_base is None:
        return None
    return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - start


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until the other side closes its end. The first byte says that all imports went well."""
    answers.write(READY)
    answers.flush()
    while header := requests.read(8):
        request = pickle.loads(requests.read(struct.unpack("<q", header)[0]))
        # The kernel ends this process even while a C library spins and the parent is gone.
        signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 5)
        arrays: list[np.ndarray] = []
        try:
            answer, arrays = (probe(request), []) if request["probe"] else decode(request)
        except Failure as failure:
            answer = {"failure": failure.args}
        except MemoryError:
            answer = {"failure": ("memory", "video", "the frames do not fit into memory")}
        except Exception as error:  # the parent turns whatever happened into one MediaError
            answer = {"failure": ("corrupt", "container", f"{type(error).__name__}: {error}")}
        signal.setitimer(signal.ITIMER_REAL, 0)
        arrays = [np.ascontiguousarray(array) for array in arrays]
        answer["arrays"] = [(array.dtype.str, array.shape) for array in arrays]
        payload = pickle.dumps(answer)
        answers.write(struct.pack("<q", len(payload)) + payload)
        for array in arrays:
            answers.write(array.data.cast("B"))
        answers.flush()


if __name__ == "__main__":
    av.logging.set_level(None)
    # A launcher signals whole process trees; this process ends with the one that asks it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # Libraries that print must not write into the answers.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, channel)
