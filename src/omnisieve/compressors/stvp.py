"""STVP: OmniSIFT's similarity pruner alone (arXiv 2602.04804, section 3.2), with a training-free audio side.

Video is pruned per frame by dissimilarity to the frame mean (first frame of a window) or to the co-located token of
the frame before. The paper has no counterpart for audio; ours ranks the audio tokens of a window by a mix of
dissimilarity to the audio token before and to the mean of the window.

`rounding="official"` rounds as OmniSIFT's code does, n - int(n * dropped). Windows
last 2 s by time under either rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from omnisieve.compressors.base import Compressor, CompressorError, Needs, Settings, register
from omnisieve.compressors.ranked import Ranked
from omnisieve.compressors.saliency import spatiotemporal_saliency
from omnisieve.layout import Modality, SegmentKind, TokenLayout
from omnisieve.ops.similarity import cosine, cosine_to_mean


@dataclass(frozen=True, kw_only=True)
class StvpSettings(Settings):
    """Settings of STVP.

    Attributes:
        audio_novelty: in [0, 1], weight of the dissimilarity to the previous audio token; the rest goes to the
            dissimilarity to the mean of the window. 0 did best on the testbed's validation clips.
    """

    audio_novelty: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.audio_novelty <= 1:
            raise CompressorError(f"stvp: audio_novelty is {self.audio_novelty}; it is a weight in [0, 1]")


@register("stvp")
class Stvp(Compressor):
    """See the module's docstring; settings in `StvpSettings`."""

    settings: StvpSettings
    settings_type = StvpSettings
    segment_kinds: ClassVar[Mapping[Modality, SegmentKind]] = {Modality.VIDEO: "frame", Modality.AUDIO: "window"}

    def rank(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> tuple[Ranked, Ranked]:
        """What differs from its surroundings first. See `Compressor.rank`."""
        video = spatiotemporal_saliency(embeds, layout)
        audio = audio_saliency(embeds, layout, self.settings.audio_novelty)
        return self.ranked(Modality.VIDEO, video, layout, 1.0), self.ranked(Modality.AUDIO, audio, layout, 1.0)


def audio_saliency(embeds: Tensor, layout: TokenLayout, novelty: float) -> Tensor:
    """Saliency of audio tokens, [B, S]; 0 outside audio.

    Args:
        embeds: [B, S, D].
        layout: of the batch.
        novelty: weight of the dissimilarity to the token before in the same item. The first token of an item has
            none and counts its dissimilarity to the window mean in full.
    """
    windows = layout.segments("window", Modality.AUDIO)
    to_mean = windows.scatter(1 - cosine_to_mean(windows.gather(embeds), windows.valid), 0.0)
    # All audio of an item is one frame.
    items = layout.segments("frame", Modality.AUDIO)
    tokens = items.gather(embeds)
    change = 1 - cosine(tokens[:, :, 1:], tokens[:, :, :-1])
    to_previous = items.scatter(torch.cat([items.gather(to_mean)[:, :, :1], change], dim=-1), 0.0)
    return novelty * to_previous + (1 - novelty) * to_mean
