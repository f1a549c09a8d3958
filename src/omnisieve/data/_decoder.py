"""The process that decodes: reads requests from stdin, answers on stdout, and may be killed at any time.

`media.MediaReader` runs this file by its path and nothing of ours is imported here, so that a child starts in
a fraction of a second and holds neither torch nor the model libraries. A request is a pickled dictionary
behind its length; an answer is a pickled header behind its length, then the raw bytes of its arrays.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import struct
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from heapq import heappop, heappush
from typing import Any, BinaryIO

import av
import numpy as np

CONTAINERS = (
    "mov,mp4,matroska,webm,avi,asf,flv,mpegts,mpeg,mpegvideo,m4v,ogg,rm,nut,ivf,mxf,gxf,dv,wtv,gif,apng,h264,hevc,av1,"
    "wav,w64,mp3,aac,flac,aiff,ac3,eac3,amr,caf,au,ape,wv,tta,tak,mpc,mpc8,dsf,dts,truehd,voc,oma,yuv4mpegpipe"
)
"""What is opened, by FFmpeg's names. Formats that name other files or addresses (playlists, manifests) are not here."""
STAMPED = frozenset({"mov", "matroska", "flv", "ivf", "nut"})
"""Containers that store the presentation time of each packet and lead a search to a key frame. In others FFmpeg
guesses times (AVI has none for B-frames) or places (MPEG-TS has no index), so they are read from their start."""
DECLARING = frozenset({"mov", "matroska", "avi", "asf", "flv"})
"""Containers that state their duration; elsewhere FFmpeg guesses it from the bit rate."""
MIN_COMPLETE = 0.9
"""Share of the declared duration that must be in the file, and of the packets that must decode."""
READY = b"\1"
FRAME_FACTOR = 2
"""Evenly spread frames come in such groups, the temporal patches of the models."""
_CLOCK_TOLERANCE = 1e-3
_AUDIO_GAP = 0.05
_FILLED = 0.1
"""Seconds that the last block of an encoder may reach beyond the end of the sound."""
_REORDERED = 16
"""Frames that a decoder may hold back, by the standards of H.264 and HEVC."""
_CLOCK_SLIP = 1.0
"""Seconds that the clock of a file may go back, as sloppy muxers let it."""
_LOST_START = 0.2
"""Seconds at the beginning that need not decode: pictures in front of the first key frame, which players skip."""


class Failure(Exception):
    """A file that cannot be used: (kind, stream, reason), see `media.MediaError`."""


class Scan:
    """Where the packets of a file are, found without decoding.

    Attributes:
        start: container time that counts as 0 s.
        times: [frames] presentation times of the visible video frames in seconds after `start`, sorted.
        ticks: [frames] the same in units of the stream, as its packets and frames have them.
        keys: (place in the file, tick) of the key frames, hidden ones among them.
        places: {tick: place in the file} of the visible frames.
        stamped: whether each frame has a tick of its own that the container states.
        timeless: whether there are frames without any time.
        goes_back: when the clock of the frames jumps back, as in files that were joined; None if it never does.
        video_end: end of the last video frame.
        audio: start and end of the sound; None without a packet of it.
    """

    def __init__(self, path: str, video: int | None, audio: int | None = None) -> None:
        ticks: list[int] = []
        lengths: dict[int, float] = {}
        sound: list[tuple[float, float]] = []
        self.keys: list[tuple[int, int]] = []
        self.places: dict[int, int] = {}
        self.timeless, self.goes_back = False, None
        before = -math.inf
        place, stated, end = 0, True, 0.0
        with open_media(path) as container:
            self.start = (container.start_time or 0) / av.time_base
            declared = (container.duration or 0) / av.time_base
            formats = set(container.format.name.split(","))
            for packet in container.demux():
                stamp = packet.pts if packet.pts is not None else packet.dts
                if stamp is None or packet.time_base is None:
                    self.timeless |= packet.stream_index == video and packet.size > 0
                    continue
                if packet.stream_index == video:
                    place += 1
                    # Decoding times rise even where presentation times do not.
                    now = before if packet.dts is None else float(packet.dts * packet.time_base) - self.start
                    if now < before - _CLOCK_SLIP and self.goes_back is None:
                        self.goes_back = before
                    before = max(before, now)
                    stated &= packet.pts is not None
                    if packet.is_keyframe:
                        self.keys.append((place, stamp))
                if packet.is_discard:
                    continue
                time = float(stamp * packet.time_base) - self.start
                length = float((packet.duration or 0) * packet.time_base)
                end = max(end, time + length)
                if packet.stream_index == video:
                    ticks.append(stamp)
                    lengths[stamp] = length
                    self.places[stamp] = place
                elif packet.stream_index == audio:
                    sound.append((time, time + length))
            unit = 1.0 if video is None else float(_stream(container, video).time_base or 1)
        self.audio = (min(first for first, _ in sound), max(last for _, last in sound)) if sound else None
        stated &= not self.timeless and len(self.places) == len(ticks)
        self.stamped = bool(STAMPED & formats) and stated and bool(self.keys)
        self.ticks = np.sort(np.array(ticks, dtype=np.int64))
        self.times = self.ticks * unit - self.start
        step = float(np.median(np.diff(self.times))) if len(ticks) > 1 else 0.0
        self.video_end = float(self.times[-1]) + (lengths[int(self.ticks[-1])] or step or 0.04) if ticks else 0.0
        # Matroska declares where the last packet ends, others how long the file is.
        present = end + self.start if "matroska" in formats else end
        # A file without a duration of its own (a live recording) is taken as it is.
        if DECLARING & formats and present < MIN_COMPLETE * declared:
            reason = f"only {present:.1f} s of the declared {declared:.1f} s are there"
            raise Failure("truncated", "container", reason)

    def check_frames(self) -> None:
        """Refuse a video without frames, or without times for them."""
        if not len(self.ticks):
            if self.timeless:
                raise Failure("corrupt", "video", "a bare stream, which states no times for its frames")
            raise Failure("truncated", "video", "there is not a single frame")
        if self.goes_back is not None:
            reason = f"its clock goes back at {self.goes_back:.1f} s, as in files that were joined"
            raise Failure("corrupt", "video", reason)

    def check_start(self, first: float, wanted: float) -> None:
        """Refuse a video whose first frame that decodes comes long after the first that is stored and wanted."""
        if first - max(self.times[0], wanted) > _LOST_START:
            lost = f"the first {first - self.times[0]:.1f} s do not decode: what they refer to was cut away"
            raise Failure("corrupt", "video", lost)

    def by_key(self, ticks: list[int]) -> dict[int, set[int]] | None:
        """Frames to decode from each key frame; None if one has no key frame in front of it."""
        groups: dict[int, set[int]] = {}
        for tick in ticks:
            number = bisect_right(self.keys, (self.places[tick], tick)) - 1
            # A frame that is stored behind a key frame but shown before it refers to what is in front of that one.
            while number >= 0 and self.keys[number][1] > tick:
                number -= 1
            if number < 0:
                return None
            groups.setdefault(self.keys[number][1], set()).add(tick)
        return groups


def open_media(path: str) -> av.container.InputContainer:
    """Open a file of this name, whatever the name looks like, and no other that it may name."""
    return av.open(f"file:{path}", options={"protocol_whitelist": "file", "format_whitelist": CONTAINERS})


def _stream(container: av.container.InputContainer, index: int) -> Any:
    return container.streams[index]


def decode(request: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Decode what a request asks for; see `media.MediaReader.read` for its keys."""
    path = request["path"]
    info: dict[str, Any] = {}
    arrays: list[np.ndarray] = []
    try:
        video, audio, info["notes"] = _streams(path, request["track"])
        if request["video"] and video is None:
            raise Failure("no_stream", "video", "there is no video stream, only sound")
        scan = Scan(path, video)
        if request["video"] and video is not None:
            scan.check_frames()
            frames, info["video"] = _video(path, video, scan, request)
            arrays.append(frames)
        sound = None
        if audio is not None:
            sound = _audio(path, audio, scan, request["max_seconds"])
        if sound is not None:
            arrays.append(sound[0])
            info["audio"] = sound[1]
    except (av.error.FFmpegError, OSError, EOFError) as error:
        raise Failure("corrupt", "container", f"FFmpeg says: {_text(error)}") from error
    return info, arrays


def _text(error: Exception) -> str:
    """What went wrong, without the number and the name of the file."""
    return str(getattr(error, "strerror", None) or error)


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """What a file holds, from its packets and its first frame; see `media.MediaReader.probe`."""
    path = request["path"]
    info: dict[str, Any] = {"video": None, "audio": None}
    try:
        video, audio, info["notes"] = _streams(path, request["track"])
        if request["video"] and video is None:
            raise Failure("no_stream", "video", "there is no video stream, only sound")
        scan = Scan(path, video, audio)
        with open_media(path) as container:
            info["streams"] = [f"{stream.type}/{_codec(stream)}" for stream in container.streams]
            if video is not None and request["video"]:
                scan.check_frames()
                info["video"] = _probe_video(container, video, scan, request)
            if audio is not None and scan.audio is not None:
                stream = _stream(container, audio)
                start, end = scan.audio
                declared = _declared_end(stream, scan.start)
                end = declared if declared is not None and 0 < end - declared < _FILLED else end
                info["audio"] = {"seconds": end, "start": max(start, 0.0), "rate": stream.rate,
                                 "channels": stream.channels}  # fmt: skip
    except (av.error.FFmpegError, OSError, EOFError) as error:
        raise Failure("corrupt", "container", f"FFmpeg says: {_text(error)}") from error
    return info


def _probe_video(
    container: av.container.InputContainer, index: int, scan: Scan, request: dict[str, Any]
) -> dict[str, Any]:
    stream = _stream(container, index)
    tally = Counter[str]()
    time, frame = next(_decoded(stream, container, tally), (0.0, None))
    if frame is None:
        raise Failure("corrupt", "video", f"{tally['errors']} of {tally['packets']} packets do not decode")
    scan.check_start(time - scan.start, 0.0)
    turned = round(frame.rotation / 90) % 2
    picks, step = _choose(scan, stream.average_rate, request)
    return {
        "seconds": scan.video_end, "frames": len(scan.times), "rotation": frame.rotation % 360,
        "width": frame.height if turned else frame.width, "height": frame.width if turned else frame.height,
        "sampled": len(picks), "seconds_per_frame": step,
    }  # fmt: skip


def _codec(stream: Any) -> str:
    return stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"


def _streams(path: str, track: int | None) -> tuple[int | None, int | None, list[str]]:
    """Indices of the video and audio streams to read, and what to tell the user about the choice.

    Players take the stream that the container marks as default, else the first. A cover picture is no video.

    Args:
        path: of the file.
        track: which of the audio streams, counted from 0; None for the default one.
    """
    with open_media(path) as container:
        pictures = av.stream.Disposition.attached_pic
        videos = [s for s in container.streams.video if not s.disposition & pictures]
        audios = list(container.streams.audio)
        if not videos and not audios:
            raise Failure("no_stream", "container", "there is neither a video nor an audio stream")
        if track is not None and track >= len(audios):
            there = f"there are {len(audios)}, counted from 0" if audios else "there is none"
            raise Failure("no_stream", "audio", f"sound track {track} is asked for, {there}")
        video, audio = _default(videos), _default(audios) if track is None else audios[track]
        notes = [_note("picture", videos, video)] if len(videos) > 1 else []
        if len(audios) > 1 and track is None:
            notes.append(_note("sound", audios, audio))
        return _index(video), _index(audio), notes


def _note(name: str, streams: Sequence[Any], chosen: Any) -> str:
    return f"has {len(streams)} {name} tracks; number {streams.index(chosen)}, counted from 0, is read"


def _index(stream: Any) -> int | None:
    return None if stream is None else stream.index


def _default(streams: Sequence[Any]) -> Any:
    marked = [stream for stream in streams if stream.disposition & av.stream.Disposition.default]
    return next(iter(marked or streams), None)


def _video(path: str, index: int, scan: Scan, request: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames at the wanted rate, uint8 [F, H, W, 3], and their clock."""
    with open_media(path) as container:
        rate = _stream(container, index).average_rate
    picks, step = _choose(scan, rate, request)
    frames = _from_keys(path, index, scan, picks) if scan.stamped else None
    if frames is None:
        frames = _from_start(path, index, scan, scan.times[picks])
    return frames, {"seconds_per_frame": step, "duration": scan.video_end}


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


def _from_keys(path: str, index: int, scan: Scan, picks: np.ndarray) -> np.ndarray | None:
    """Frames by index, decoded from the key frames before them; None unless each came back with its own time stamp.

    Pictures that no other refers to are skipped unless they are wanted. Any error ends the attempt, because what a
    decoder makes of damage depends on where it began.
    """
    wanted = [int(tick) for tick in scan.ticks[picks]]
    groups = scan.by_key(wanted)
    if groups is None:
        return None
    pictures: dict[int, np.ndarray] = {}
    with open_media(path) as container:
        stream = _single_threaded(container, index)
        stream.codec_context.options = {"err_detect": "explode"}
        for key, missing in groups.items():
            container.seek(key, stream=stream)
            landed = False
            for packet in container.demux(stream):
                landed = landed or (packet.pts == key and packet.is_keyframe)
                if not landed:
                    return None
                needed = not packet.size or packet.pts in missing
                stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
                try:
                    frames = stream.decode(packet)
                except av.error.FFmpegError:
                    return None
                if any(frame.is_corrupt for frame in frames):
                    return None
                for frame in frames:
                    if frame.pts in missing:
                        pictures[frame.pts] = _picture(frame, next(iter(pictures.values()), None))
                        missing.remove(frame.pts)
                if not missing:
                    break
            if missing:
                return None
    return np.stack([pictures[tick] for tick in wanted])


def _from_start(path: str, index: int, scan: Scan, wanted: np.ndarray) -> np.ndarray:
    """Frames by time, by decoding everything: at each time [F] the last frame that is not later, as a player shows it.

    Where a container states no presentation times, they are what FFmpeg makes of the order of its packets. For H.264
    with B-frames in AVI they go back and forth by a few frames, so frames are sorted before they are chosen.

    Raises:
        Failure: more than a tenth of the packets do not decode, or the opening frames do not.
    """
    out: list[np.ndarray] = []
    tally = Counter[str]()
    first: float | None = None
    shown: av.VideoFrame | None = None
    with open_media(path) as container:
        for time, frame in _sorted(_decoded(_single_threaded(container, index), container, tally), scan.start):
            first = time if first is None else first
            while shown is not None and len(out) < len(wanted) and time > wanted[len(out)] + _CLOCK_TOLERANCE:
                out.append(_picture(shown, out[0] if out else None))
            if len(out) == len(wanted):
                break
            shown = frame
        while shown is not None and len(out) < len(wanted):
            out.append(_picture(shown, out[0] if out else None))
    if first is None or tally["errors"] > (1 - MIN_COMPLETE) * tally["packets"]:
        raise Failure("corrupt", "video", f"{tally['errors']} of {tally['packets']} packets do not decode")
    scan.check_start(first, wanted[0])
    return np.stack(out)


def _decoded(
    stream: Any, container: av.container.InputContainer, tally: Counter[str]
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Frames as they leave the decoder, and their container times; counts "packets" and "errors"."""
    time = 0.0
    for packet in container.demux(stream):
        tally["packets"] += 1
        try:
            frames = stream.decode(packet)
        except av.error.FFmpegError:
            tally["errors"] += 1
            continue
        for frame in frames:
            time = time if frame.time is None else frame.time
            yield time, frame


def _sorted(frames: Iterable[tuple[float, av.VideoFrame]], start: float) -> Iterator[tuple[float, av.VideoFrame]]:
    """Frames by time in seconds after `start`, where none is further from its place than a decoder may reorder."""
    waiting: list[tuple[float, int, av.VideoFrame]] = []
    for number, (time, frame) in enumerate(frames):
        heappush(waiting, (time - start, number, frame))
        if len(waiting) > _REORDERED:
            time, _, frame = heappop(waiting)
            yield time, frame
    while waiting:
        time, _, frame = heappop(waiting)
        yield time, frame


def _single_threaded(container: av.container.InputContainer, index: int) -> Any:
    stream = _known(_stream(container, index), "video")
    stream.thread_count = 1
    return stream


def _known(stream: Any, kind: str) -> Any:
    if stream.codec_context is None:
        raise Failure("corrupt", kind, "its codec is not known")
    return stream


def _picture(frame: av.VideoFrame, other: np.ndarray | None) -> np.ndarray:
    """One frame upright as uint8 [H, W, 3], in the size of another of the clip."""
    turns = round(frame.rotation / 90) % 4
    height, width = (0, 0) if other is None else other.shape[:2]
    if turns % 2:
        height, width = width, height
    stored = _rgb(frame, width or None, height or None)
    return np.ascontiguousarray(np.rot90(stored, turns))


def _rgb(frame: av.VideoFrame, width: int | None, height: int | None) -> np.ndarray:
    """uint8 [H, W, 3]; what is transparent lies on white, as in images."""
    if not (frame.format.has_palette or any(component.is_alpha for component in frame.format.components)):
        return frame.reformat(format="rgb24", width=width, height=height).to_ndarray()
    pixels = frame.reformat(format="rgba", width=width, height=height).to_ndarray().astype(np.uint16)
    opaque = pixels[..., 3:]
    return ((pixels[..., :3] * opaque + 255 * (255 - opaque) + 127) // 255).astype(np.uint8)


def _audio(path: str, index: int, scan: Scan, max_seconds: float | None) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Mean of the channels, float32 [samples] at the file's own rate, on the clip's clock; None if it is empty."""
    pieces: list[np.ndarray] = []
    written = packets = errors = 0
    with open_media(path) as container:
        stream = _known(_stream(container, index), "audio")
        rate, length = stream.rate, (container.duration or 0) / av.time_base
        # Only to float32: what FFmpeg makes of several channels is louder than their mean. Not planar, because PyAV
        # reads beyond the planes of eight channels.
        packed, shape = av.AudioResampler(format="flt", rate=rate), None
        limit = None if max_seconds is None else round(max_seconds * rate)
        declared = _declared_end(stream, scan.start)
        for packet in container.demux(stream):
            packets += packet.size > 0
            try:
                decoded = stream.decode(packet)
            except av.error.FFmpegError:
                errors += 1
                continue
            for frame in decoded:
                gap = (frame.time or 0.0) - scan.start - written / rate
                # A late start, or a hole in a recording, is silence; a stamp past the file's end is a lie.
                if _AUDIO_GAP < gap < length:
                    pieces.append(np.zeros(round(gap * rate), dtype=np.float32))
                    written += len(pieces[-1])
                if shape not in (None, found := (frame.format.name, frame.layout.name, frame.sample_rate)):
                    packed = av.AudioResampler(format="flt", rate=rate)  # a broadcast may change from stereo to mono
                shape = found
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
    if declared is not None and 0 < len(wave) - declared * rate < _FILLED * rate:
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
