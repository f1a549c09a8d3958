"""Token layouts for tests, described by what is in a sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omnisieve.layout import Modality, TokenLayout, TokenMap


@dataclass(frozen=True)
class LayoutSpec:
    """One sample: text, then one video (with sound) or its parts, then text.

    Attributes:
        windows: 2-s windows.
        grids_per_window: video grids in a window; 0 leaves windows without a grid.
        rows, columns: merged patch grid.
        audio_per_window: audio tokens in a window.
        video, audio: whether the modality is there.
        separate_audio: the audio is a file of its own, after the video.
        videos: how many such videos follow each other.
        images: tokens of an image before the video.
        odd_grids: the last window has one grid less.
        grid_every: with a capped frame rate only every n-th window has grids.
        growth: rows that each further video has more than the one before.
    """

    windows: int = 3
    grids_per_window: int = 2
    rows: int = 4
    columns: int = 4
    audio_per_window: int = 10
    video: bool = True
    audio: bool = True
    separate_audio: bool = False
    videos: int = 1
    images: int = 0
    odd_grids: bool = False
    grid_every: int = 1
    growth: int = 0
    text: int = 5


def make_map(spec: LayoutSpec) -> TokenMap:
    """The token map of one sample."""
    tokens: list[tuple[int, ...]] = []  # modality, item, frame, row, column, time, stream
    text = (Modality.TEXT, -1, -1, -1, -1, -1, -1)
    tokens += [text] * spec.text
    item = stream = 0
    if spec.images:
        tokens += [(Modality.IMAGE, item, 0, 0, i, 0, stream) for i in range(spec.images)] + [text]
        item, stream = item + 1, stream + 1
    for number in range(spec.videos):
        own_audio = spec.audio and not spec.separate_audio
        video_item, audio_item = item, item + spec.video
        frame = 0
        for window in range(spec.windows):
            if spec.video and window % spec.grid_every == 0:
                grids = spec.grids_per_window - (spec.odd_grids and window == spec.windows - 1)
                for grid in range(grids):
                    time = 50 * window + 50 * grid // max(spec.grids_per_window, 1)
                    tokens += [
                        (Modality.VIDEO, video_item, frame, r, c, time, stream)
                        for r in range(spec.rows + number * spec.growth)
                        for c in range(spec.columns)
                    ]
                    frame += 1
            if own_audio:
                tokens += _audio(spec, window, audio_item, stream)
        item, stream = item + spec.video + own_audio, stream + 1
        tokens.append(text)
    if spec.audio and spec.separate_audio:
        for window in range(spec.windows):
            tokens += _audio(spec, window, item, stream)
    tokens += [text] * spec.text
    columns = np.array(tokens, dtype=np.int64).T
    return TokenMap(*columns)


def make_layout(*specs: LayoutSpec, padding_side: str = "right", length: int | None = None) -> TokenLayout:
    """The layout of a batch."""
    return TokenLayout.stack([make_map(spec) for spec in specs], padding_side=padding_side, length=length)


def _audio(spec: LayoutSpec, window: int, item: int, stream: int) -> list[tuple[int, ...]]:
    step = max(50 // max(spec.audio_per_window, 1), 1)
    return [(Modality.AUDIO, item, 0, 0, j, 50 * window + step * j, stream) for j in range(spec.audio_per_window)]
