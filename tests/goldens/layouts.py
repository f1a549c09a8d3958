"""Token layouts of the golden inputs."""

from __future__ import annotations

import numpy as np

from omnisieve.layout import Modality, TokenLayout, TokenMap

VIDEO_ID, AUDIO_ID, MERGE = 151656, 151646, 2


def input_map(arrays: dict[str, np.ndarray]) -> TokenMap:
    """One video with its sound, from ids, M-RoPE positions and the grid."""
    ids, (time, height, width) = arrays["input_ids"][0], arrays["position_ids"][:, 0]
    video, audio = ids == VIDEO_ID, ids == AUDIO_ID
    media = video | audio
    _, rows, columns = (int(n) for n in arrays["video_grid_thw"][0])
    patches = rows // MERGE * (columns // MERGE)
    start = time[media].min()
    return TokenMap(
        modality=np.where(video, Modality.VIDEO, np.where(audio, Modality.AUDIO, Modality.TEXT)).astype(np.int64),
        item=np.where(video, 0, np.where(audio, 1, -1)),
        frame=np.where(video, (np.cumsum(video) - 1) // patches, np.where(audio, 0, -1)),
        row=np.where(video, height - start, np.where(audio, 0, -1)),
        column=np.where(video, width - start, np.where(audio, 0, -1)),
        time=np.where(media, time - start, -1),
        stream=np.where(media, 0, -1),
    )


def input_layout(*samples: dict[str, np.ndarray]) -> TokenLayout:
    return TokenLayout.stack([input_map(arrays) for arrays in samples])


def video_layout(grids: int, patches: int, text: tuple[int, int] = (0, 0)) -> TokenLayout:
    """Silent video: `grids` grids of `patches` tokens in one window, with text tokens before and after."""
    frame, column = np.divmod(np.arange(grids * patches), patches)
    zeros = np.zeros_like(frame)
    video = (zeros, frame, zeros, column, frame, zeros)
    modality = np.pad(zeros + Modality.VIDEO, text, constant_values=Modality.TEXT)
    return TokenLayout.stack([TokenMap(modality, *(np.pad(values, text, constant_values=-1) for values in video))])
