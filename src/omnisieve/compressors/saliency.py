"""Training-free scores that several methods share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from omnisieve.layout import Modality, TokenLayout
from omnisieve.ops.similarity import cosine, cosine_to_mean, segment_mean


def previous_frame_change(
    embeds: Tensor, layout: TokenLayout, within: Literal["window", "item"] = "window"
) -> tuple[Tensor, Tensor]:
    """Dissimilarity of video tokens to the co-located token one frame earlier.

    Args:
        embeds: [B, S, D].
        layout: of the batch.
        within: see `TokenLayout.previous_frame_token`.

    Returns:
        1 - cosine [B, S] and whether there is an earlier token [B, S]; the former means nothing without the latter.
    """
    previous = layout.previous_frame_token(within)
    earlier = embeds.gather(1, previous.clamp(min=0).unsqueeze(-1).expand_as(embeds))
    return 1 - cosine(embeds, earlier), previous >= 0


def spatiotemporal_saliency(embeds: Tensor, layout: TokenLayout) -> Tensor:
    """Saliency of video tokens, [B, S] (OmniSIFT, section 3.2): 0 outside video.

    In the first frame of a window: dissimilarity to the mean of the frame's tokens. In later frames: dissimilarity
    to the co-located token of the frame before, before anything was pruned.
    """
    frames = layout.segments("frame", Modality.VIDEO)
    spatial = frames.scatter(1 - cosine_to_mean(frames.gather(embeds), frames.valid), 0.0)
    temporal, has_previous = previous_frame_change(embeds, layout)
    return torch.where(has_previous, temporal, spatial)


def alternating_saliency(tokens: Tensor, spatial: Tensor, odd: Tensor) -> Tensor:
    """The spatial score in even frames, dissimilarity to the co-located token of the frame before in odd ones.

    Args:
        tokens: [B, F, P, D].
        spatial: [B, F, P].
        odd: [B, F, 1] bool; the frame before an odd one is the one before it in F.

    Returns:
        [B, F, P].
    """
    return torch.where(odd, 1 - cosine(tokens, tokens.roll(1, dims=1)), spatial)


def relative_to_window(attention: Tensor, layout: TokenLayout) -> Tensor:
    """Audio attention divided by the mean of its window, [B, S]; 0 outside audio.

    An encoder that attends within blocks of 2 s hands out a fixed sum per block, so raw values of different windows
    do not compare.
    """
    windows = layout.segments("window", Modality.AUDIO)
    values = windows.gather(attention)
    mean = segment_mean(values.unsqueeze(-1), windows.valid)
    return windows.scatter(values / mean.clamp(min=1e-12), 0.0)
