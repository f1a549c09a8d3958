"""Token layouts for tests, described by what is in a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from hypothesis import strategies as st

from omnisieve.layout import Modality, TokenLayout, TokenMap

QWEN2_5, QWEN3 = FAMILIES = ("qwen2_5", "qwen3")
IDS_PER_WINDOW: Mapping[str, int] = {QWEN2_5: 50, QWEN3: 26}


@dataclass(frozen=True)
class LayoutSpec:
    """One sample: text, then one video (with sound) or its parts, then text.

    Attributes:
        windows: 2-s windows.
        grids_per_window: video grids in a window; 0 leaves windows without a grid.
        rows, columns: merged patch grid.
        audio_per_window: audio tokens in a window; a real Qwen3 has 26.
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


def make_map(spec: LayoutSpec, family: str = QWEN2_5) -> TokenMap:
    """The token map of one sample: a video and its sound window by window, or token by token in Qwen3."""
    ids = IDS_PER_WINDOW[family]
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
        frame, body = 0, []
        for window in range(spec.windows):
            if spec.video and window % spec.grid_every == 0:
                grids = spec.grids_per_window - (spec.odd_grids and window == spec.windows - 1)
                for grid in range(grids):
                    time = ids * window + ids * grid / max(spec.grids_per_window, 1)
                    body += [
                        (Modality.VIDEO, video_item, frame, r, c, time, stream)
                        for r in range(spec.rows + number * spec.growth)
                        for c in range(spec.columns)
                    ]
                    frame += 1
            if own_audio:
                body += _audio(spec, window, audio_item, stream, ids)
        # A grid goes before the audio token of the same time.
        tokens += sorted(body, key=itemgetter(5)) if family == QWEN3 else body
        item, stream = item + spec.video + own_audio, stream + 1
        tokens.append(text)
    if spec.audio and spec.separate_audio:
        for window in range(spec.windows):
            tokens += _audio(spec, window, item, stream, ids)
    tokens += [text] * spec.text
    # Times of grids may be fractions; the map has their whole part.
    return TokenMap(*np.array(tokens).astype(np.int64).T)


def make_layout(
    *specs: LayoutSpec, padding_side: str = "right", length: int | None = None, family: str = QWEN2_5
) -> TokenLayout:
    """The layout of a batch."""
    maps = [make_map(spec, family) for spec in specs]
    return TokenLayout.stack(maps, padding_side=padding_side, length=length, ids_per_window=IDS_PER_WINDOW[family])


def _audio(spec: LayoutSpec, window: int, item: int, stream: int, ids: int) -> list[tuple[int, ...]]:
    count = spec.audio_per_window
    step = max(ids // max(count, 1), 1)
    return [(Modality.AUDIO, item, 0, 0, count * window + j, ids * window + step * j, stream) for j in range(count)]


specs = st.builds(
    LayoutSpec,
    windows=st.integers(1, 4),
    grids_per_window=st.integers(0, 3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
    audio_per_window=st.integers(0, 12),
    video=st.booleans(),
    audio=st.booleans(),
    separate_audio=st.booleans(),
    videos=st.integers(1, 2),
    images=st.integers(0, 3),
    odd_grids=st.booleans(),
    grid_every=st.integers(1, 3),
    growth=st.integers(0, 2),
    text=st.integers(0, 3),
)
