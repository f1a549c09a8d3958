from __future__ import annotations

import numpy as np
import pytest
import torch

from omnisieve.data.media import VideoFrames
from omnisieve.data.preprocess import Preprocessor
from tests.data.stock import rules, stock_processor
from tests.models import FAMILIES, QWEN2_5, QWEN3


def make(family: str = QWEN2_5, **pixels: int) -> Preprocessor:
    return Preprocessor(stock_processor(family), rules(family), **pixels)


@pytest.mark.parametrize("samples", [480, 481, 900, 16_000, 16_001, 16_159, 50_000, 47_999])
def test_sound_equals_the_padded_extractors(samples: int) -> None:
    wave = np.random.default_rng(samples).standard_normal(samples).astype(np.float32) * 0.1
    ours = make().audio(wave)
    stock = stock_processor().feature_extractor(
        wave, sampling_rate=16_000, padding="max_length", return_attention_mask=True, return_tensors="pt"
    )
    real = int(stock["attention_mask"].sum())
    assert ours is not None
    assert ours.shape == (128, real)
    expected = stock["input_features"][0, :, :real]
    # Matrices of a few columns are multiplied by another kernel: the last bit may differ there.
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-7 if real < 10 else 0)


@pytest.mark.parametrize("samples", [1, 160, 481, 16_000, 16_159, 50_000])
def test_sound_of_qwen3_equals_that_beside_a_longer_one(samples: int) -> None:
    # Its stock processor pads to the longest of a batch; alone, the last frame would mirror what is before it.
    wave = np.random.default_rng(samples).standard_normal(samples).astype(np.float32) * 0.1
    ours = make(QWEN3).audio(wave)
    stock = stock_processor(QWEN3).feature_extractor(
        [wave, np.zeros(64_000, dtype=np.float32)],
        sampling_rate=16_000, padding=True, truncation=False, return_attention_mask=True, return_tensors="pt",
    )  # fmt: skip
    real = int(stock["attention_mask"][0].sum())
    assert ours is not None
    assert ours.shape == (128, real)
    torch.testing.assert_close(ours, stock["input_features"][0, :, :real], rtol=0, atol=2e-7 if real < 10 else 0)


def test_sound_beyond_300_s_is_not_cut() -> None:
    mel = make().audio(np.zeros(301 * 16_000, dtype=np.float32))
    assert mel is not None
    assert mel.shape == (128, 30_100)


def test_sound_too_short_for_a_token_is_none() -> None:
    assert make().audio(np.zeros(320, dtype=np.float32)) is None
    assert make().audio(np.zeros(321, dtype=np.float32)) is not None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("frames", "grids"), [(1, 1), (2, 1), (3, 2), (8, 4)])
def test_video_equals_the_stock_processors(frames: int, grids: int, family: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (frames, 60, 90, 3), dtype=np.uint8)
    patches = make(family, min_pixels=56 * 56, max_pixels=84 * 84).video(VideoFrames(pixels, 0.5, frames / 2))
    filled = np.concatenate([pixels, pixels[-1:]]) if frames % 2 else pixels
    stock = stock_processor(family).video_processor(
        [torch.from_numpy(filled).permute(0, 3, 1, 2)],
        size={"shortest_edge": 56 * 56, "longest_edge": 84 * 84},
        return_tensors="pt",
    )
    assert patches.grid == tuple(stock["video_grid_thw"][0].tolist()) == (grids, 4, 6)
    assert torch.equal(patches.pixels, stock["pixel_values_videos"])
    assert patches.seconds_per_grid == 1.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("height", "width"), [(64, 128), (90, 200)])
def test_frames_are_shown_as_the_tower_sees_them(height: int, width: int, family: str) -> None:
    tool = make(family, min_pixels=56 * 56, max_pixels=64 * 160)
    picture = np.random.default_rng(0).integers(0, 256, (5, height, width, 3), dtype=np.uint8)
    patches = tool.video(VideoFrames(picture, 0.5, 2.5))
    shown = tool.shown(patches, range(3))
    # Frames of that size are not resized any more, and give the same patches.
    assert torch.equal(tool.video(VideoFrames(shown, 0.5, 3.0)).pixels, patches.pixels)
    assert np.array_equal(shown[4], shown[5])  # the last one was repeated to fill its step
    assert np.array_equal(tool.shown(patches, [2, 0]), shown[[4, 5, 0, 1]])


def test_frames_of_the_towers_size_are_shown_pixel_by_pixel() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (2, 56, 84, 3), dtype=np.uint8)
    tool = make(min_pixels=56 * 84, max_pixels=56 * 84)
    assert np.array_equal(tool.shown(tool.video(VideoFrames(picture, 0.5, 1.0)), [0]), picture)


def test_long_videos_keep_their_pixels() -> None:
    pixels = np.zeros((400, 28, 28, 3), dtype=np.uint8)
    grid = make(min_pixels=28 * 28, max_pixels=56 * 56).video(VideoFrames(pixels, 0.5, 200.0)).grid
    assert grid == (200, 2, 2)


def test_pixel_limits_hold_for_videos_and_images() -> None:
    small, large = np.zeros((1, 30, 30, 3), np.uint8), np.zeros((1, 300, 600, 3), np.uint8)
    tool = make(min_pixels=56 * 56, max_pixels=112 * 112)
    for picture, low, high in ((small, 56 * 56, 84 * 84), (large, 84 * 84, 112 * 112)):
        video = tool.video(VideoFrames(picture, 0.5, 0.5))
        image = tool.image(picture[0])
        assert image.grid == video.grid
        assert low <= image.grid[1] * image.grid[2] * 14 * 14 <= high
    with pytest.raises(ValueError, match="is above max_pixels"):
        make(min_pixels=100_000, max_pixels=10_000)
