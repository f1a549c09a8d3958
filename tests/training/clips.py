"""What the log of runs in memory is about: clips that can be drawn, and records without what differs by chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from omnisieve.data.batch import Batch
from omnisieve.layout import Modality, TokenMap
from omnisieve.training.pictures import ClipMedia, Film

PIXELS = 28  # per token and side
MEL_PER_TOKEN = 4


def lasting(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of the log without times and memory, which differ from run to run."""
    return {name: value for name, value in record.items() if "second" not in name and "memory" not in name}


def probes_of(batch: Callable[[Sequence[int]], Batch], count: int) -> dict[str, Callable[[], ClipMedia]]:
    """The first clips as probes.

    Args:
        batch: of some clips.
        count: how many.
    """

    def probe(clip: int) -> Callable[[], ClipMedia]:
        return lambda: drawable(batch([clip]))

    return {f"clip {clip}": probe(clip) for clip in range(count)}


def drawable(batch: Batch) -> ClipMedia:
    """Grey frames, and a spectrogram that rises from left to right, for the tokens of a batch of one clip."""
    names = [field.name for field in fields(TokenMap)]
    present = batch.layout.modality[0] != Modality.PADDING
    tokens = TokenMap(**{name: getattr(batch.layout, name)[0][present] for name in names})
    films, sounds = [], []
    for item in np.unique(tokens.item[tokens.modality == Modality.VIDEO]):
        member = tokens.item == item
        steps, rows, columns = (int(axis[member].max()) + 1 for axis in (tokens.frame, tokens.row, tokens.column))
        grey = np.full((steps, rows * PIXELS, columns * PIXELS, 3), 128, np.uint8)
        films.append(Film(grey, range(steps), 1.0))
    for item in np.unique(tokens.item[tokens.modality == Modality.AUDIO]):
        count = int((tokens.item == item).sum())
        sounds.append(np.tile(np.arange(count * MEL_PER_TOKEN, dtype=np.float32), (8, 1)))
    return ClipMedia(batch.ids[0], tokens, tuple(films), tuple(sounds))
