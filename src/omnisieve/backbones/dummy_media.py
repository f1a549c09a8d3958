"""Encoders in lockstep: the same module calls on every rank, whatever its samples hold.

Under ZeRO-3 every call of a module gathers its weights from all ranks, and a rank that leaves a call out lets the
others wait for ever. The decoder is called alike for any batch; the encoders are not called for media that a batch
lacks. There they run on a dummy: one grid of a video or an image, which becomes one token, or two seconds of silence.
What comes out of it is dropped, so no number changes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from omnisieve.data.batch import Batch
from omnisieve.layout import Modality

DUMMY_MEL_FRAMES = 200


def with_dummies(batch: Batch, missing: Set[Modality], vision: Any, audio: Any) -> Batch:
    """The batch with encoder inputs for media that it lacks; nothing else of it knows of them.

    Args:
        batch: on its device.
        missing: media that it lacks.
        vision, audio: configurations of the encoders.
    """
    if not missing:
        return batch
    dummies = _dummies(
        vision.spatial_merge_size,
        vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        audio.num_mel_bins,
        batch.input_ids.device,
    )
    inputs: dict[str, Any] = {name: value for modality in missing for name, value in dummies[modality].items()}
    return replace(batch, **inputs)


@lru_cache
def _dummies(merge: int, patch: int, mel_bins: int, device: torch.device) -> dict[Modality, dict[str, Tensor]]:
    """Encoder inputs of one item, by their names in `Batch`; the encoders bring them to their own precision.

    Args:
        merge: patches per token and side.
        patch: values of a patch.
        mel_bins: of a spectrogram.
        device: of the inputs.
    """
    pixels = torch.zeros(merge**2, patch, device=device)
    grid = torch.tensor([[1, merge, merge]], device=device)
    return {
        Modality.IMAGE: {"pixel_values": pixels, "image_grid_thw": grid},
        Modality.VIDEO: {"pixel_values_videos": pixels, "video_grid_thw": grid},
        Modality.AUDIO: {
            "input_features": torch.zeros(1, mel_bins, DUMMY_MEL_FRAMES, device=device),
            "feature_attention_mask": torch.ones(1, DUMMY_MEL_FRAMES, dtype=torch.long, device=device),
        },
    }


@contextmanager
def convolutions_called_once(audio_tower: nn.Module) -> Iterator[None]:
    """A context in which the tower of Qwen3-Omni convolves all of its sound at once.

    It takes the seconds of a batch 500 at a time to save memory: a rank with more sound than another would call the
    convolutions more often. At once they hold about 6 MB for each second, until the encoder's layers begin.
    """
    name = "conv_chunksize"
    before = getattr(audio_tower, name, None)
    if before is None:
        yield
        return
    setattr(audio_tower, name, sys.maxsize)
    try:
        yield
    finally:
        setattr(audio_tower, name, before)
