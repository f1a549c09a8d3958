"""Every frame is the one that decoding from the start gives, or the file is refused; every second has its sound."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from omnisieve.data.dataset import MediaLoader
from omnisieve.data.feature_cache import media_key
from omnisieve.data.manifest import MediaPart
from omnisieve.data.media import MediaError, MediaReader
from omnisieve.data.preprocess import Preprocessor
from tests.data.numbered_media import CASES, HEIGHT, WIDTH, Case, at, draw, number_of, pitch, pitches_of, shown, write
from tests.data.stock import rules, stock_processor

BY_NAME = {case.name: case for case in CASES}
REFUSED = {"cut_between.mkv", "cut_between.ts", "cut_between.mp4", "cut_between_mpeg2.ts"}
"""Files whose opening frames refer to what was cut away."""


@pytest.fixture(scope="module")
def reader() -> Iterator[MediaReader]:
    found = MediaReader()
    yield found
    found.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a case, written once; not to be changed."""
    return cache(lambda name: write(tmp_path_factory.mktemp("numbered"), BY_NAME[name]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_frame_is_the_one_that_a_player_shows(
    file: Callable[[str], Path], reader: MediaReader, case: Case
) -> None:
    path = file(case.name)
    if case.name in REFUSED:
        with pytest.raises(MediaError, match="cut away"):
            reader.read(path)
        return
    frames = shown(path)
    for fps, cap in ((case.rate, None), (2.0, 7)):
        video = reader.read(path, fps=fps, max_frames=cap).video
        assert video is not None
        wanted = [at(frames, k * video.seconds_per_frame) for k in range(len(video.frames))]
        assert [number_of(frame) for frame in video.frames] == wanted


@pytest.mark.parametrize("name", ["closed.mp4", "hevc_open.mp4", "closed.avi", "cut.mp4", "late.mkv", "mpeg2.mpg"])
def test_evenly_spread_frames_count_those_that_are_shown(
    file: Callable[[str], Path], reader: MediaReader, name: str
) -> None:
    path = file(name)
    numbers = [number for _, number in shown(path)]
    video = reader.read(path, fps=2.0, placement="even", min_frames=2).video
    assert video is not None
    picks = np.linspace(0, len(numbers) - 1, len(video.frames)).round().astype(int)
    assert [number_of(frame) for frame in video.frames] == [numbers[pick] for pick in picks]


@pytest.mark.parametrize("case", [case for case in CASES if case.sound], ids=lambda case: case.name)
def test_each_second_has_its_tone_of_the_default_track(
    file: Callable[[str], Path], reader: MediaReader, case: Case
) -> None:
    wave = reader.read(file(case.name), video=False).audio
    assert wave is not None
    factor = case.tracks[case.default]
    found = pitches_of(wave)
    assert len(found) >= int(case.seconds - case.cut - 0.1)
    assert found == pytest.approx([pitch(int(case.cut + k + 0.5)) * factor for k in range(len(found))], abs=4)


def test_a_sound_track_can_be_named(file: Callable[[str], Path], reader: MediaReader) -> None:
    path = file("third_track.mkv")
    for track in (0, 1, 2):
        wave = reader.read(path, video=False, audio_track=track).audio
        assert wave is not None
        assert pitches_of(wave)[0] == pytest.approx(pitch(0) * (track + 1), abs=4)
    with pytest.raises(MediaError, match=r"sound track 3 is asked for, there are 3, counted from 0"):
        reader.read(path, audio_track=3)
    with pytest.raises(MediaError, match=r"sound track 0 is asked for, there is none"):
        reader.read(file("open.mp4"), audio_track=0)


def test_a_part_of_a_manifest_names_the_track_that_is_heard(file: Callable[[str], Path]) -> None:
    loader = MediaLoader(Preprocessor(stock_processor(), rules()))
    path = file("third_track.mkv")
    mels = [loader.load_part(MediaPart("video", path, audio_track=track)).mel for track in (None, 2, 0)]
    assert torch.equal(mels[0], mels[1])
    assert not torch.equal(mels[0], mels[2])
    assert len({media_key(MediaPart("video", path, audio_track=track)) for track in (None, 0, 2)}) == 3


def test_the_choice_of_a_track_is_told_once_for_each_file(
    tmp_path: Path, reader: MediaReader, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, BY_NAME["second_track.mkv"])
    with caplog.at_level(logging.WARNING):
        reader.read(path)
        reader.probe(path)
        reader.read(path, audio_track=0)
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"{path}: has 2 sound tracks; number 1, counted from 0, is read"]


def test_the_default_picture_track_is_read(tmp_path: Path, reader: MediaReader) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=10) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        streams[0].disposition = av.stream.Disposition(0)
        streams[1].disposition = av.stream.Disposition.default
        for stream, level in zip(streams, (50, 200), strict=True):
            for _ in range(10):
                picture = np.full((HEIGHT, WIDTH, 3), level, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    video = reader.read(path).video
    assert video is not None
    assert abs(int(video.frames.mean()) - 200) < 5


@pytest.mark.parametrize(
    "name",
    ["12:30.mp4", "http:x.mp4", "pipe:0.mp4", "file:a.mp4", "concat:a|b.mp4", "a%03d.mp4", "-i.mp4", "a b#?*.mp4"],
)
@pytest.mark.parametrize("relative", [False, True])
def test_no_name_is_interpreted(
    tmp_path: Path, reader: MediaReader, monkeypatch: pytest.MonkeyPatch, name: str, relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    os.rename(write(tmp_path, BY_NAME["closed.mp4"]), tmp_path / name)
    fresh = MediaReader()  # a child that starts in this folder
    video = fresh.read(name if relative else tmp_path / name).video
    fresh.close()
    assert video is not None
    assert [number_of(frame) for frame in video.frames] == list(range(0, 80, 10))


def test_a_bare_stream_is_refused(tmp_path: Path, reader: MediaReader) -> None:
    path = tmp_path / "bare.h264"
    with av.open(str(path), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(1), format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match="states no times for its frames"):
        reader.read(path)


@pytest.mark.parametrize("name", ["closed.ts", "mpeg2.mpg"])
def test_joined_files_are_refused(tmp_path: Path, reader: MediaReader, name: str) -> None:
    path = write(tmp_path, BY_NAME[name])
    path.write_bytes(2 * path.read_bytes())
    for look in (reader.read, reader.probe):
        with pytest.raises(MediaError, match=r"its clock goes back at [34]\.\d s"):
            look(path)


def test_channels_may_change_within_a_sound(tmp_path: Path, reader: MediaReader) -> None:
    path = tmp_path / "a.mp3"
    for layout in ("stereo", "mono"):
        with av.open(str(tmp_path / f"{layout}.mp3"), "w", options={"write_xing": "0"}) as container:
            stream = container.add_stream("libmp3lame", rate=16_000, layout=layout)
            frame = av.AudioFrame(format="s16p", layout=layout, samples=32_000)
            for plane in frame.planes:
                plane.update((np.sin(np.arange(32_000) / 4) * 9000).astype(np.int16).tobytes())
            frame.sample_rate = 16_000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        with path.open("ab") as file:
            file.write((tmp_path / f"{layout}.mp3").read_bytes())
    wave = reader.read(path, video=False).audio
    assert wave is not None
    assert len(wave) / 16_000 == pytest.approx(4, abs=0.3)
    assert np.abs(wave[40_000:60_000]).max() > 0.1


def test_transparent_frames_lie_on_white(tmp_path: Path, reader: MediaReader) -> None:
    images = []
    for step in range(4):
        picture = Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 0))
        picture.paste((0, 0, 0, 255), (10 * step, 0, 10 * step + 40, HEIGHT))
        images.append(picture)
    for name in ("a.png", "a.gif"):
        options = {"save_all": True, "append_images": images[1:], "duration": 500, "disposal": 2}
        images[0].save(tmp_path / name, **options)
        video = reader.read(tmp_path / name).video
        assert video is not None
        assert len(video.frames) == 4
        for step, frame in enumerate(video.frames):
            assert frame[:, 10 * step + 2 : 10 * step + 38].max() < 5, name
            assert frame[:, 10 * step + 42 :].min() > 250, name


def test_relative_paths_follow_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path / "inner", BY_NAME["closed.mp4"])
    reader = MediaReader()
    monkeypatch.chdir(tmp_path)
    reader.read("inner/closed.mp4")
    monkeypatch.chdir(tmp_path / "inner")
    video = reader.read("closed.mp4").video
    reader.close()
    assert video is not None
    assert [number_of(frame) for frame in video.frames] == list(range(0, 80, 10))


PLAYLISTS = {
    "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nclosed.ts\n#EXT-X-ENDLIST\n",
    "a.ffconcat": "ffconcat version 1.0\nfile closed.ts\n",
    "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "a.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>',
}


@pytest.mark.parametrize("name", PLAYLISTS)
@pytest.mark.parametrize("suffix", ["", ".mp4"])
def test_files_that_name_other_files_are_refused(tmp_path: Path, reader: MediaReader, name: str, suffix: str) -> None:
    write(tmp_path, BY_NAME["closed.ts"])
    path = tmp_path / (name + suffix)
    path.write_text(PLAYLISTS[name])
    with pytest.raises(MediaError, match="names other files or addresses, which are never opened") as caught:
        reader.read(path)
    assert caught.value.kind == "not_media"
