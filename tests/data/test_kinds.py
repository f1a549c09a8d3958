"""What a file is, is told by its content, whatever its name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omnisieve.data.formats import Converter
from omnisieve.data.kinds import kind_of
from omnisieve.data.manifest import parse_line
from omnisieve.data.media import MediaReader
from omnisieve.data.sources import Entry, kind_of_entry, read_entries
from tests.data.media_files import MediaSpec, write_media

SOUND = {"mp4": "aac", "webm": "libopus", "mka": "aac", "mkv": "aac", "wma": "libmp3lame", "aiff": "pcm_s16be", "wav":
         "pcm_s16le", "mp3": "libmp3lame", "flac": "flac", "ogg": "libopus", "m4a": "aac", "mov": "aac"}  # fmt: skip
FILMS = {"mp4": "libx264", "webm": "libvpx-vp9", "mkv": "libx264", "mov": "libx264", "avi": "mpeg4", "ts": "libx264"}


def sound(folder: Path, suffix: str) -> Path:
    rate = 48_000 if SOUND[suffix] == "libopus" else 16_000
    spec = MediaSpec(seconds=0, audio_seconds=0.5, audio_codec=SOUND[suffix], sample_rate=rate)
    return write_media(folder / f"a.{suffix}", spec)


def film(folder: Path, suffix: str) -> Path:
    audio = {"webm": "libopus", "avi": "pcm_s16le"}.get(suffix, "aac")
    spec = MediaSpec(seconds=0.5, video_codec=FILMS[suffix], audio_codec=audio, sample_rate=48_000)
    return write_media(folder / f"a.{suffix}", spec)


def picture(folder: Path, suffix: str, frames: int = 1) -> Path:
    first, *others = (Image.fromarray(np.full((32, 32, 3), 9 * level, np.uint8)) for level in range(frames))
    first.save(folder / f"a.{suffix}", **({"save_all": True, "append_images": others} if others else {}))
    return folder / f"a.{suffix}"


@pytest.mark.parametrize("suffix", SOUND)
def test_sound_in_any_container_is_sound(tmp_path: Path, suffix: str, reader: MediaReader) -> None:
    path = sound(tmp_path, suffix).rename(tmp_path / "a.mp4")
    assert kind_of(path) == kind_of(path.read_bytes()) == "audio"
    assert reader.read(path, video=False).audio is not None


@pytest.mark.parametrize("suffix", FILMS)
def test_films_are_videos(tmp_path: Path, suffix: str) -> None:
    assert kind_of(film(tmp_path, suffix).rename(tmp_path / "a.wav")) == "video"


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp", "gif", "avif"])
def test_pictures_are_images(tmp_path: Path, suffix: str) -> None:
    assert kind_of(picture(tmp_path, suffix).rename(tmp_path / "a.mp4")) == "image"


def test_an_animated_image_is_a_video_where_it_can_be_read_as_one(tmp_path: Path, reader: MediaReader) -> None:
    for suffix, kind in (("gif", "video"), ("png", "video"), ("webp", "image"), ("tif", "image")):
        assert kind_of(picture(tmp_path, suffix, frames=3)) == kind
    for suffix in ("gif", "png"):
        assert len(reader.probe(tmp_path / f"a.{suffix}").streams) == 1
        assert reader.probe(tmp_path / f"a.{suffix}").video.frames == 3


def test_a_photo_of_a_phone_is_no_film(tmp_path: Path) -> None:
    assert kind_of(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 50) == "image"


@pytest.mark.parametrize("content", [b"", b"text\n" * 99, b"#EXTM3U\n#EXTINF:1,\na.ts\n",
                                     b"ffconcat version 1.0\nfile a\n",
                                     np.random.default_rng(0).bytes(5000)])  # fmt: skip
def test_what_is_no_medium_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.ts").write_bytes(content)
    assert kind_of(tmp_path / "a.ts") is None


def test_what_is_no_file_is_none(tmp_path: Path) -> None:
    assert [kind_of(path) for path in (tmp_path, tmp_path / "gone", "a" * 5000, "a\0b")] == [None] * 4


def test_converted_rows_have_the_kind_of_the_content(tmp_path: Path) -> None:
    converter = Converter(tmp_path / "m.jsonl", tmp_path)
    sound(tmp_path, "webm")
    film(tmp_path, "mp4").rename(tmp_path / "b.mp4")
    for column, name, kind in (("path", "a.webm", "audio"), ("video", "a.webm", "audio"), ("path", "b.mp4", "video"),
                               ("audio", "b.mp4", "audio")):  # fmt: skip
        row = converter.convert(Entry("row 1", {column: name, "question": "?"}))
        assert parse_line(str(row), tmp_path / "m.jsonl", 1).media[0].kind == kind
    (tmp_path / "damaged.wav").write_bytes(b"RIFF")
    assert kind_of_entry("damaged.wav", tmp_path) == "audio"
    assert kind_of_entry({"bytes": (tmp_path / "a.webm").read_bytes(), "path": "x.mp4"}, tmp_path) == "audio"


def test_a_folder_has_its_media_whatever_their_names(tmp_path: Path) -> None:
    sound(tmp_path, "wma").rename(tmp_path / "sound.dat")
    picture(tmp_path, "tif")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "damaged.mp4").write_bytes(b"damaged")
    found = [entry.row["path"] for entry in read_entries(str(tmp_path), "folder")]
    assert found == ["a.tif", "damaged.mp4", "sound.dat"]
    assert json.loads(str(Converter(tmp_path / "m.jsonl", tmp_path, question="?").convert(
        Entry("file", {"path": "sound.dat"})
    )))["messages"][0]["content"][0]["type"] == "audio"  # fmt: skip
