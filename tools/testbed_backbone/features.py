"""From clips to encoder inputs and features: written as mp4, decoded, and run through the stock extractors."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2VLVideoProcessor, WhisperFeatureExtractor

from omnisieve.backbones import adapter_for
from omnisieve.data.synthetic import Clip, draw_frames, make_waveform, write_mp4

GRID_THW = (12, 12, 12)
PATCHES = 12 * 12 * 12
MEL_FRAMES = 1197
VIDEO_TOKENS = 432
AUDIO_TOKENS = 299


def media_order() -> Tensor:
    """Return, for each of the 731 media tokens in sequence order, its index in [video tokens; audio tokens]."""
    order = []
    for window in range(6):
        order += range(window * 72, window * 72 + 72)
        order += range(VIDEO_TOKENS + window * 50, VIDEO_TOKENS + min(window * 50 + 50, AUDIO_TOKENS))
    return torch.tensor(order)


def decode(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return frames uint8 [24, 168, 168, 3] and waveform float32 [191488] of an mp4 file's bytes."""
    with av.open(io.BytesIO(data)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(io.BytesIO(data)) as container:
        wave = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    return frames, wave


@lru_cache(maxsize=1)
def _extractors() -> tuple[Qwen2VLVideoProcessor, WhisperFeatureExtractor]:
    """Return the stock extractors; frames from 56 x 56 pixels up are not enlarged."""
    size = {"shortest_edge": 56 * 56, "longest_edge": 768 * 28 * 28}
    video = Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False)
    return video, WhisperFeatureExtractor(feature_size=128)


def encoder_inputs(picture: Clip, sound: Clip) -> tuple[Tensor, Tensor]:
    """Write and decode the picture of one clip with the sound of one (usually the same).

    Returns:
        Patches float16 [1728, 1176] and log-mel float16 [128, 1197].

    Raises:
        RuntimeError: the file did not decode to 12 grids of 12 x 12 patches.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, draw_frames(picture), make_waveform(sound))
        frames, wave = decode(path.read_bytes())
    video = _extractors()[0](torch.from_numpy(frames).permute(0, 3, 1, 2), return_tensors="pt")
    if video["video_grid_thw"].tolist() != [list(GRID_THW)]:
        raise RuntimeError(f"{picture.id}: decoded to grid {video['video_grid_thw'].tolist()}, expected {GRID_THW}")
    return video["pixel_values_videos"].half(), log_mel(wave).half()


def log_mel(wave: np.ndarray) -> Tensor:
    """Return the stock log-mel [128, ceil(samples / 160)] without padding the sound to 300 s."""
    padded = np.pad(wave, (0, -len(wave) % 160 + 320))
    features = _extractors()[1](
        padded, sampling_rate=16_000, padding="longest", truncation=False, return_tensors="pt"
    ).input_features[0]
    return features[:, : -(-len(wave) // 160)]


def tower_features(model: Any, patches: Tensor, mels: Tensor) -> tuple[Tensor, Tensor]:
    """Run both towers on a batch.

    Args:
        model: the thinker.
        patches: [B, 1728, 1176].
        mels: [B, 128, 1197].

    Returns:
        Video [B, 432, D] and audio features [B, 299, D].
    """
    batch = len(patches)
    grid = torch.tensor([GRID_THW] * batch)
    adapter = adapter_for(model)
    video = adapter.visual(patches.flatten(0, 1).float(), grid_thw=grid).pooler_output
    lengths = torch.full((batch,), MEL_FRAMES)
    mel = mels.float().transpose(0, 1).flatten(1)
    audio = adapter.audio_tower(mel, feature_lens=lengths).last_hidden_state
    return video.unflatten(0, (batch, -1)), audio.unflatten(0, (batch, -1))
