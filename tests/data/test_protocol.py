"""Frames and sizes of the published protocols, by the formulas of qwen_omni_utils 0.0.9."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnisieve.data._decoder import spread
from omnisieve.data.media import MediaReader, VideoFrames
from omnisieve.data.preprocess import Preprocessor
from omnisieve.data.protocol import PRESETS, Preset, frame_pixels
from tests.data.media_files import frame_level
from tests.data.stock import rules, stock_processor
from tests.models import FAMILIES, QWEN2_5, QWEN3

ROOT = Path(__file__).parents[2]
SIDES = {QWEN2_5: 28, QWEN3: 32}
FUSED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
TOTALS = st.one_of(st.integers(2, 3000), st.integers(2, 200_000))


def smart_nframes(total: int, rate: float, fps: float, min_frames: int, max_frames: int | None) -> int:
    """That of qwen_omni_utils."""
    least = math.ceil(min_frames / 2) * 2
    most = math.floor((min(768, total) if max_frames is None else max_frames) / 2) * 2
    return math.floor(min(min(max(total / rate * fps, least), most), total) / 2) * 2


@given(
    TOTALS,
    st.sampled_from([15.0, 23.976023976023978, 25.0, 29.97002997002997, 30.0, 59.94]),
    st.sampled_from([0.1, 0.7, 1.0, 2.0, 4.0, 100.0]),
    st.integers(1, 9),
    st.integers(2, 800),
)
def test_frames_are_as_many_and_where_the_published_ones_are(
    total: int, rate: float, fps: float, min_frames: int, max_frames: int
) -> None:
    picks, seconds = spread(total, rate, fps, min_frames, max_frames)
    count = smart_nframes(total, rate, fps, min_frames, max_frames)
    # Where a file is so long, and the rate so low, that not even two are left, qwen_omni_utils refuses it.
    count = max(count, 2)
    assert len(picks) == count
    assert len(picks) % 2 == 0
    assert seconds == 1 / (count / total * rate)
    assert (picks[0], picks[-1]) == (0, total - 1)
    exact = [Fraction((total - 1) * index, count - 1) for index in range(count)]
    # To the nearest, but for what float32 cannot tell from the middle between two frames.
    assert all(
        abs(pick - place) <= Fraction(1, 2) + Fraction(total, 2**22) for pick, place in zip(picks, exact, strict=True)
    )


@pytest.mark.skipif(not FUSED, reason="without AVX2, torch rounds twice where it otherwise rounds once")
@given(TOTALS, st.integers(1, 400))
def test_frames_are_those_of_torch_to_the_bit(total: int, pairs: int) -> None:
    picks, _ = spread(total, 1.0, 1.0, 2 * pairs, 2 * pairs)
    expected = torch.linspace(0, total - 1, len(picks)).round().long()
    np.testing.assert_array_equal(picks, expected.numpy())


@pytest.mark.parametrize(("total", "picks"), [(1, [0]), (2, [0, 1]), (3, [0, 2]), (4, [0, 1, 2, 3]), (5, [0, 1, 3, 4])])
def test_short_videos_are_valid_too(total: int, picks: list[int]) -> None:
    found, seconds = spread(total, 10.0, 2.0, 4, 768)
    assert found.tolist() == picks
    assert seconds == pytest.approx(total / 10 / len(picks))


@pytest.mark.parametrize("name", ["clip.mp4", "av1.mp4"])
def test_a_file_is_read_from_its_first_to_its_last_frame(
    media: Callable[..., Path], reader: MediaReader, name: str
) -> None:
    path = media(name, **({"video_codec": "libsvtav1"} if name == "av1.mp4" else {}))
    asked = {"fps": 1.0, "min_frames": 6, "max_frames": 100, "placement": "even"}
    video = reader.read(path, **asked).video
    levels = video.frames[:, 40, 50].mean(axis=-1)
    assert np.abs(levels - [frame_level(index) for index in (0, 8, 16, 23, 31, 39)]).max() <= 6
    assert video.seconds_per_frame == pytest.approx(4 / 6)
    info = reader.probe(path, **asked).video
    assert (info.sampled, info.seconds_per_frame) == (6, video.seconds_per_frame)


def test_a_file_of_one_frame_gives_one_grid(media: Callable[..., Path], reader: MediaReader) -> None:
    path = media("one_frame.mp4", seconds=0.1, rate=10)
    video = reader.read(path, min_frames=4, max_frames=768, placement="even").video
    assert len(video.frames) == reader.probe(path, min_frames=4, placement="even").video.sampled == 1
    patches = Preprocessor(stock_processor(), rules()).video(video)
    assert patches.grid[0] == 1


def published_size(family: str, frames: int, height: int, width: int) -> tuple[int, int]:
    """`fetch_video` of qwen_omni_utils, for a file of so many sampled frames."""
    factor = SIDES[family]
    least, most, total = 128 * factor**2, 768 * factor**2, 128_000 * factor * factor * 0.9
    most = max(min(most, total / frames * 2), int(least * 1.05))
    h, w = (max(factor, round(edge / factor) * factor) for edge in (height, width))
    if h * w > most:
        beta = math.sqrt(height * width / most)
        h, w = (math.floor(edge / beta / factor) * factor for edge in (height, width))
    elif h * w < least:
        beta = math.sqrt(least / (height * width))
        h, w = (math.ceil(edge * beta / factor) * factor for edge in (height, width))
    return h, w


def preprocessor(family: str, name: str = "qwen_omni_utils") -> Preprocessor:
    protocol = PRESETS[name].protocol(name, SIDES[family])
    return Preprocessor(
        stock_processor(family), rules(family), min_pixels=protocol.min_pixels, max_pixels=protocol.max_pixels,
        total_pixels=protocol.total_pixels,
        image_pixels=(protocol.min_image_pixels, protocol.max_image_pixels),
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("height", "width"), [(144, 176), (272, 640), (720, 1280), (1920, 1080), (360, 362)])
def test_sizes_are_the_published_ones_for_any_number_of_frames(family: str, height: int, width: int) -> None:
    tool, merge = preprocessor(family), SIDES[family] // 2
    for frames in (2, 4, 10, 300, 302, 400, 510, 768):
        h, w = published_size(family, frames, height, width)
        assert tool.video_grid(frames, height, width) == (frames // 2, h // merge, w // merge)


def test_the_grid_that_is_foretold_is_the_one_that_is_read() -> None:
    tool = preprocessor(QWEN2_5)
    tool.total_pixels = 6 * 150 * 28 * 28  # what 768 frames do to a released model, 12 do here
    for frames in (2, 6, 12):
        video = VideoFrames(np.zeros((frames, 300, 400, 3), np.uint8), 0.5, frames / 2)
        assert tool.video(video).grid == tool.video_grid(frames, 300, 400)
    assert tool.video_grid(2, 300, 400)[1:] > tool.video_grid(12, 300, 400)[1:]


def test_images_have_sizes_of_their_own() -> None:
    tool = preprocessor(QWEN2_5)
    assert tool.image(np.zeros((56, 84, 3), np.uint8)).grid == (1, 4, 6)
    assert tool.video_grid(2, 56, 84)[1] > 4


@given(st.integers(1, 400), st.integers(1, 10**6), st.integers(0, 10**6), st.one_of(st.none(), st.integers(1, 10**9)))
def test_a_cap_on_the_total_leaves_every_frame_its_least(pairs: int, least: int, more: int, total: int | None) -> None:
    most = frame_pixels(2 * pairs, least, least + more, total)
    assert least <= most <= least + more
    if total is None:
        assert most == least + more


def test_the_page_has_the_presets_as_they_are() -> None:
    page = (ROOT / "docs" / "protocols.md").read_text()
    for name, preset in PRESETS.items():
        assert isinstance(preset, Preset)
        values = " | ".join(f"{getattr(preset, item.name):,g}" for item in fields(Preset))
        assert f"| `{name}` | {values} |" in page
