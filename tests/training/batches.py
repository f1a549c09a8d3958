"""Training batches in memory: no files, no processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from omnisieve.backbones import adapter_for
from omnisieve.data.batch import Batch, Features
from tests.models import SILENT, SOUNDING, SPEECH, Media, tiny_inputs

# Clips that all differ; what a clip holds depends on nothing but its entry here.
CLIPS: Sequence[Sequence[Media]] = (
    [SOUNDING],
    [SILENT],
    [SPEECH],
    [Media(mel=380)],
    [Media(grids=6, mel=600)],
    [Media(grids=2, mel=200)],
    [Media(grids=5, rows=3)],
    [Media(grids=4, rows=3, mel=360)],
)
ANSWER_PLACES = (5, 4, 1)  # from the end: an answer of two tokens, one of one token


def make_batch(model: nn.Module, samples: Sequence[Sequence[Media]]) -> Batch:
    """A batch whose samples end with two answers."""
    inputs = tiny_inputs(model, samples, padding_side="right")
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        for place in ANSWER_PLACES:
            labels[row, length - place] = inputs["input_ids"][row, length - place]
    layout = adapter_for(model).layout(inputs["input_ids"], inputs["position_ids"], inputs["attention_mask"])
    rope = inputs["position_ids"][1:]
    answer_tokens = (len(ANSWER_PLACES),) * len(samples)
    return Batch(**inputs | {"position_ids": rope}, labels=labels, layout=layout, answer_tokens=answer_tokens)


def with_features(batch: Batch, features: Features | None) -> Batch:
    """The batch as it comes from a feature cache."""
    media = ("pixel_values_videos", "pixel_values", "input_features", "feature_attention_mask")
    return replace(batch, features=features, **dict.fromkeys(media))
