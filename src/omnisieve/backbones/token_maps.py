"""Token maps of a batch that reached the model without a layout, read from its ids and rope positions.

Start and end tokens stand around every media item, so a contiguous run of media tokens is one stream: an image, an
audio file, or a video with its sound interleaved. Its first token sits at the start of the stream's clock, and rope
positions are that start plus (time, row, column); grids are not needed.
"""

from __future__ import annotations

import numpy as np

from omnisieve.data.tokens import whole_ids
from omnisieve.layout import Modality, TokenMap


def token_maps(modality: np.ndarray, position_ids: np.ndarray) -> list[TokenMap]:
    """Maps of every sample, without its padding.

    Args:
        modality: [B, S] of `Modality` values, padding included.
        position_ids: [3, B, S] temporal, height and width ids.
    """
    present = modality != Modality.PADDING
    return [_sample(modality[b, present[b]], position_ids[:, b, present[b]]) for b in range(len(modality))]


def _sample(modality: np.ndarray, positions: np.ndarray) -> TokenMap:
    media = modality >= Modality.IMAGE
    audio = modality == Modality.AUDIO
    visual = media & ~audio
    starts = np.flatnonzero(media & ~np.pad(media, (1, 0))[:-1])
    owner = np.searchsorted(starts, np.arange(len(media)), side="right") - 1
    stream = np.where(media, owner, -1)
    origin = np.zeros(len(media), dtype=positions.dtype)
    origin[media] = positions[0, starts][stream[media]]
    time, row, column = whole_ids(positions - origin)

    # The vision item of a stream comes before its audio item.
    item = np.full(len(media), -1, dtype=np.int64)
    item[media] = np.unique(2 * stream[media] + audio[media], return_inverse=True)[1]
    corners = np.cumsum(visual & (row == 0) & (column == 0))
    frame = np.zeros(len(media), dtype=np.int64)
    if visual.any():
        first_corner = corners[starts]
        frame[visual] = corners[visual] - first_corner[stream[visual]]
    return TokenMap(
        modality=modality,
        item=item,
        frame=np.where(media, frame, -1),
        row=np.where(media, np.where(audio, 0, row), -1),
        column=np.where(media, column, -1),  # of audio: its place in the one row
        time=np.where(media, time, -1),
        stream=stream,
    )
