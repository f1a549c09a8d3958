from __future__ import annotations

import logging
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from omnisieve.data.media import MediaError, MediaReader, VideoFrames, _resample
from tests.data.media_files import FAULTS, TONE_HZ, frame_level, write_faulty

Media = Callable[..., Path]
CONTAINERS = {
    "clip.mp4": {},
    "clip.mkv": {},
    "clip.webm": {
        "video_codec": "libvpx-vp9", "audio_codec": "libopus", "sample_rate": 48_000, "channels": 2,
    },
    "av1.mp4": {"video_codec": "libsvtav1"},
    "clip.ts": {},
}  # fmt: skip


def levels(frames: np.ndarray) -> list[int]:
    """The grey level of each frame, away from the white rows."""
    return [round(float(frame[frame.shape[0] // 2, frame.shape[1] // 2].mean())) for frame in frames]


def assert_frames(frames: np.ndarray, indices: list[int]) -> None:
    wanted = [frame_level(i) for i in indices]
    assert len(frames) == len(wanted)
    assert np.abs(np.array(levels(frames)) - wanted).max() <= 6


def first_frames(name: str) -> list[int]:
    """Frames every 0.5 s at 10 per second; an MPEG-TS muxer delays the picture by 64 ms against the sound."""
    return [0, *range(4, 35, 5)] if name == "clip.ts" else [*range(0, 40, 5)]


def frames_of(reader: MediaReader, path: Path, **options: Any) -> VideoFrames:
    video = reader.read(path, **options).video
    assert video is not None
    return video


def sound_of(reader: MediaReader, path: Path, **options: Any) -> np.ndarray:
    wave = reader.read(path, video=False, **options).audio
    assert wave is not None
    return wave


def onset(wave: np.ndarray) -> float:
    """Second at which the tone starts."""
    return float(np.argmax(np.abs(wave) > 0.2)) / 16_000


@pytest.mark.parametrize("name", CONTAINERS)
def test_frames_and_sound_of_every_container(media: Media, reader: MediaReader, name: str) -> None:
    clip = reader.read(media(name, **CONTAINERS[name]), fps=2.0)
    assert clip.video is not None
    assert clip.audio is not None
    assert_frames(clip.video.frames, first_frames(name))
    assert clip.video.frames.dtype == np.uint8
    assert clip.video.frames.shape[1:] == (56, 112, 3)
    assert clip.video.seconds_per_frame == 0.5
    assert clip.audio.dtype == np.float32
    assert len(clip.audio) == pytest.approx(64_000, abs=1_600)
    spectrum = np.abs(np.fft.rfft(clip.audio[16_000:32_000]))
    assert int(spectrum.argmax()) == TONE_HZ


def test_cap_spreads_frames_over_the_clip(media: Media, reader: MediaReader) -> None:
    for name in ("clip.mp4", "av1.mp4"):
        video = frames_of(reader, media(name, **CONTAINERS[name]), fps=2.0, max_frames=4)
        assert_frames(video.frames, [0, 10, 20, 30])
        assert video.seconds_per_frame == pytest.approx(1.0)
        assert video.duration == pytest.approx(4.0, abs=0.01)


def test_more_frames_than_the_file_has_are_repeated(media: Media, reader: MediaReader) -> None:
    for name in ("clip.mp4", "av1.mp4"):
        video = frames_of(reader, media(name, **CONTAINERS[name]), fps=20.0)
        assert_frames(video.frames, [k // 2 for k in range(80)])


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="PyAV below 18 cannot write it")
@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_rotated_video_is_upright(media: Media, reader: MediaReader, rotation: int, codec: str) -> None:
    frames = frames_of(
        reader, media(f"rotated{rotation}{codec}.mp4", seconds=1.0, rotation=rotation, video_codec=codec)
    ).frames
    upright = np.rot90(frames[0], -rotation // 90)  # back to the stored picture, whose first rows are white
    assert upright.shape == (56, 112, 3)
    assert upright[:6].min() > 200
    assert upright[12:].max() < 200


def test_silent_video_has_no_sound(media: Media, reader: MediaReader) -> None:
    path = media("silent.mp4", audio_seconds=0)
    clip = reader.read(path)
    assert clip.audio is None
    assert clip.video is not None
    assert len(clip.video.frames) == 8
    assert reader.read(path, video=False).audio is None


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv"])
def test_late_sound_is_padded_with_silence(media: Media, reader: MediaReader, name: str) -> None:
    wave = sound_of(reader, media(name, audio_start=1.5, audio_seconds=2.0))
    assert onset(wave) == pytest.approx(1.5, abs=0.03)
    assert len(wave) / 16_000 == pytest.approx(3.5, abs=0.1)


@pytest.mark.parametrize("seconds", [2.0, 6.0])
def test_sound_shorter_or_longer_than_the_video(media: Media, reader: MediaReader, seconds: float) -> None:
    clip = reader.read(media(f"sound{seconds:g}.mp4", audio_seconds=seconds))
    assert clip.video is not None
    assert clip.audio is not None
    assert len(clip.video.frames) == 8
    assert len(clip.audio) / 16_000 == pytest.approx(seconds, abs=0.07)


def test_aac_padding_is_cut_at_the_declared_end(media: Media, reader: MediaReader) -> None:
    wave = sound_of(reader, media("clip.mp4"))
    assert len(wave) == 64_000


def test_long_sound_is_cut_and_reported(media: Media, caplog: pytest.LogCaptureFixture) -> None:
    reader = MediaReader()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            wave = sound_of(reader, media("clip.mp4"), max_seconds=1.5)
            assert len(wave) == 24_000
    reader.close()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2  # the 1st and the 2nd; the next one is the 4th
    assert "4.0 s of sound cut to 1.5 s" in messages[0]
    assert "1 file(s) cut so far" in messages[0]
    assert "2 file(s) cut so far" in messages[1]


@pytest.mark.parametrize("seconds", [0.3, 0.1])
def test_shortest_clips_have_a_frame(media: Media, reader: MediaReader, seconds: float) -> None:
    clip = reader.read(media(f"short{seconds:g}.mp4", seconds=seconds))
    assert clip.video is not None
    assert clip.audio is not None
    assert_frames(clip.video.frames, [0])


@pytest.mark.parametrize(
    ("name", "codec"), [("sound.wav", "pcm_s16le"), ("sound.m4a", "aac"), ("sound.mp3", "libmp3lame")]
)
def test_audio_files(media: Media, reader: MediaReader, name: str, codec: str) -> None:
    path = media(name, seconds=0.0, audio_seconds=2.0, audio_codec=codec, sample_rate=44_100, channels=2)
    wave = sound_of(reader, path)
    assert len(wave) == pytest.approx(32_000, abs=900)
    with pytest.raises(MediaError, match="only sound") as caught:
        reader.read(path)
    assert (caught.value.kind, caught.value.stream) == ("no_stream", "video")


@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1", "7.1"])
def test_sound_is_the_mean_of_its_channels(tmp_path: Path, reader: MediaReader, layout: str) -> None:
    channels = av.AudioLayout(layout).nb_channels
    levels = np.arange(1, channels + 1) * 1000 * np.resize([1, -1, 1], channels)
    wave = np.sin(np.arange(16_000) / 20)[:, None] * levels
    samples = wave.round().astype(np.int16)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout=layout)
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    heard = sound_of(reader, tmp_path / "sound.wav")
    np.testing.assert_allclose(heard, samples.mean(axis=1) / 2**15, rtol=0, atol=1e-6)


def test_what_the_new_rate_cannot_hold_is_filtered_out() -> None:
    # A tone within reach stays as it is, to 0.1 %; one above half of 16 kHz is gone.
    time = np.arange(44_100) / 44_100
    for hertz, low, high in ((100, 0.999, 1.001), (7000, 0.999, 1.001), (8200, 0, 0.001), (12_000, 0, 0.001)):
        heard = _resample(np.sin(2 * np.pi * hertz * time).astype(np.float32), 44_100)
        assert low <= np.abs(heard[2000:-2000]).max() <= high


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_gives_its_error(tmp_path: Path, reader: MediaReader, fault: str) -> None:
    path = write_faulty(tmp_path / f"{fault}.mp4", fault)
    with pytest.raises(MediaError) as caught:
        reader.read(path)
    assert caught.value.kind == FAULTS[fault]
    assert caught.value.file == str(path)
    assert str(path) in str(caught.value)
    assert "Cure:" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_missing_file_and_folder(tmp_path: Path, reader: MediaReader) -> None:
    for path in (tmp_path / "nothing.mp4", tmp_path):
        with pytest.raises(MediaError, match="missing"):
            reader.read(path)


def test_cut_by_less_than_a_tenth_gives_what_is_there(tmp_path: Path, media: Media, reader: MediaReader) -> None:
    content = media("cut.mkv", seconds=20.0, rate=10).read_bytes()
    path = tmp_path / "cut.mkv"
    path.write_bytes(content[: len(content) * 96 // 100])
    video = frames_of(reader, path)
    assert 36 <= len(video.frames) <= 40
    assert_frames(video.frames[:30], [5 * k for k in range(30)])


def test_isolated_damage_is_concealed(tmp_path: Path, media: Media, reader: MediaReader) -> None:
    content = bytearray(media("fast.mp4", options=(("movflags", "faststart"),)).read_bytes())
    content[len(content) * 7 // 10 : len(content) * 7 // 10 + 40] = bytes(40)
    path = tmp_path / "scratched.mp4"
    path.write_bytes(content)
    clip = reader.read(path)
    assert clip.video is not None
    assert len(clip.video.frames) == 8


def test_time_limit_kills_and_replaces_the_child(media: Media) -> None:
    reader = MediaReader(decode_seconds=10)
    reader.read(media("clip.mp4"))
    child = reader._child
    assert child is not None
    os.kill(child.pid, signal.SIGSTOP)  # a child that hangs
    reader.decode_seconds = 0.3
    start = time.monotonic()
    with pytest.raises(MediaError, match=r"not decoded within 0\.3 s") as caught:
        reader.read(media("clip.mp4"))
    assert caught.value.kind == "timeout"
    assert time.monotonic() - start < 3
    assert child.poll() is not None
    reader.decode_seconds = 10
    assert reader.read(media("clip.mp4")).video is not None
    reader.close()


def test_a_child_that_dies_is_replaced(media: Media) -> None:
    reader = MediaReader()
    reader.read(media("clip.mp4"))
    assert reader._child is not None
    reader._child.kill()
    with pytest.raises(MediaError) as caught:
        reader.read(media("clip.mp4"))
    assert caught.value.kind == "crashed"
    assert reader.read(media("clip.mp4")).video is not None
    reader.close()


class Files(Dataset):
    def __init__(self, reader: MediaReader, path: Path) -> None:
        self.reader, self.path = reader, path

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, int]:
        clip = self.reader.read(self.path)
        assert clip.video is not None
        return len(clip.video.frames), self.reader._child.pid if self.reader._child else 0


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_reader_that_was_used_serves_in_workers(media: Media, context: str) -> None:
    reader = MediaReader()
    reader.read(media("clip.mp4"))
    own = reader._child.pid if reader._child else 0
    loader = DataLoader(Files(reader, media("clip.mp4")), batch_size=1, num_workers=2, multiprocessing_context=context)
    counts, children = zip(*[(int(n), int(pid)) for n, pid in loader], strict=True)
    assert counts == (8, 8, 8, 8)
    assert len(set(children)) == 2
    assert own not in children
    assert reader.read(media("clip.mp4")).video is not None
    assert reader._child is not None
    assert reader._child.pid == own
    reader.close()


def test_a_probe_tells_what_is_in_a_file(media: Media, reader: MediaReader) -> None:
    info = reader.probe(media("late.mp4", audio_start=1.5, audio_seconds=2.0), fps=2.0, max_frames=4)
    assert info.streams == ("video/h264", "audio/aac")
    assert info.video is not None
    assert info.audio is not None
    assert (info.video.frames, info.video.width, info.video.height, info.video.rotation) == (40, 112, 56, 0)
    assert (info.video.sampled, info.video.seconds_per_frame) == (4, pytest.approx(1.0))
    assert info.video.seconds == pytest.approx(4.0)
    assert info.audio.start == pytest.approx(1.5, abs=0.1)
    assert info.audio.seconds == pytest.approx(3.5, abs=0.1)
    assert (info.audio.rate, info.audio.channels) == (16_000, 1)
    assert reader.probe(media("silent.mp4", audio_seconds=0)).audio is None
    sound = reader.probe(media("clip.mp4"), video=False)
    assert sound.video is None
    assert sound.audio is not None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_probe_finds_the_same_faults(tmp_path: Path, reader: MediaReader, fault: str) -> None:
    with pytest.raises(MediaError) as caught:
        reader.probe(write_faulty(tmp_path / "x.mp4", fault))
    assert caught.value.kind == FAULTS[fault]
