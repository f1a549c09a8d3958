"""Samples to one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from omnisieve.data.batch import Batch, Features, Sample
from omnisieve.data.tokens import IGNORED
from omnisieve.layout import TokenLayout


def collate(
    samples: Sequence[Sample],
    *,
    pad_token_id: int,
    padding_side: Literal["left", "right"] = "right",
    ids_per_window: int = 50,
    pad_to_multiple_of: int = 1,
) -> Batch:
    """Pad samples to one length and put their media in one row each.

    Args:
        samples: at least one; with or without sound, video, images and text in any mixture, but either all with
            cached features or none.
        pad_token_id: of the tokenizer.
        padding_side: "right" for training, "left" for generation.
        ids_per_window: temporal rope ids in one window of the layout.
        pad_to_multiple_of: S is rounded up to a multiple of this.

    Returns:
        A batch whose padding has attention mask 0, label -100 and position 0.

    Raises:
        ValueError: no samples, or cached and uncached samples mixed.
    """
    if not samples:
        raise ValueError("an empty batch cannot be collated")
    longest = max(len(sample.input_ids) for sample in samples)
    length = -(-longest // pad_to_multiple_of) * pad_to_multiple_of

    def pad(values: Sequence[Tensor], fill: int) -> Tensor:
        out = values[0].new_full((len(values), *values[0].shape[:-1], length), fill)
        for row, value in zip(out, values, strict=True):
            size = value.shape[-1]
            row[..., slice(0, size) if padding_side == "right" else slice(length - size, length)] = value
        return out

    labels = pad([s.labels for s in samples], IGNORED)
    videos = [video for s in samples for video in s.videos]
    images = [image for s in samples for image in s.images]
    audios = [audio for s in samples for audio in s.audios]
    input_features, feature_mask = _stack_audio(audios)
    return Batch(
        input_ids=pad([s.input_ids for s in samples], pad_token_id),
        attention_mask=pad([torch.ones_like(s.input_ids) for s in samples], 0),
        labels=labels,
        position_ids=pad([s.position_ids for s in samples], 0).transpose(0, 1).contiguous(),
        layout=TokenLayout.stack(
            [s.tokens for s in samples],
            length=length,
            padding_side=padding_side,
            ids_per_window=ids_per_window,
            names=[s.id for s in samples],
        ),
        pixel_values_videos=torch.cat([video.pixels for video in videos]) if videos else None,
        video_grid_thw=_grids([grid for s in samples for grid in s.video_grids]),
        video_second_per_grid=_seconds([seconds for s in samples for seconds in s.seconds_per_grid]),
        pixel_values=torch.cat([image.pixels for image in images]) if images else None,
        image_grid_thw=_grids([grid for s in samples for grid in s.image_grids]),
        input_features=input_features,
        feature_attention_mask=feature_mask,
        features=_join_features(samples),
        answer_tokens=tuple(np.sum(labels.numpy() != IGNORED, axis=1).tolist()),
        ids=tuple(s.id for s in samples),
        meta=tuple(s.meta for s in samples),
        failures=tuple(failure for s in samples for failure in s.failures),
        lowered=tuple(s.lowered for s in samples if s.lowered is not None),
    )


def _stack_audio(audios: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Spectrograms [mel, T] as [A, mel, longest] and the mask [A, longest] of what is real."""
    if not audios:
        return None, None
    longest = max(audio.shape[1] for audio in audios)
    features = audios[0].new_zeros(len(audios), audios[0].shape[0], longest)
    mask = torch.zeros(len(audios), longest, dtype=torch.long)
    for index, audio in enumerate(audios):
        features[index, :, : audio.shape[1]] = audio
        mask[index, : audio.shape[1]] = 1
    return features, mask


def _grids(grids: Sequence[tuple[int, int, int]]) -> Tensor | None:
    return torch.tensor(grids, dtype=torch.long) if grids else None


def _seconds(seconds: Sequence[float]) -> Tensor | None:
    return torch.tensor(seconds, dtype=torch.float32) if seconds else None


def _join_features(samples: Sequence[Sample]) -> Features | None:
    """Cached features of all samples that have media, in batch order; None without a cache."""
    with_media = [s for s in samples if (s.tokens.item >= 0).any()]
    cached = [s.features for s in with_media if s.features is not None]
    if not cached:
        return None
    if len(cached) < len(with_media):
        missing = [s.id for s in with_media if s.features is None]
        raise ValueError(f"samples {missing} have no cached features while others of the batch have")
    return Features.join(cached)
