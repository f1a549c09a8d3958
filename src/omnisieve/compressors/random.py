"""Random: tokens of each modality are kept uniformly over the sample.

The score of a token depends on the seed and on its ordinal within its modality only, so a sample keeps the same
tokens alone, in any batch and in every copy that beam search makes of it. `rounding="official"` counts
max(floor(ratio * n), 1), as the code that SEATS evaluates does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omnisieve.compressors.base import Compressor, Needs, Settings, register
from omnisieve.compressors.ranked import Ranked
from omnisieve.layout import MEDIA, Modality, TokenLayout
from omnisieve.ops.budget import floor_product


@dataclass(frozen=True, kw_only=True)
class RandomSettings(Settings):
    """Settings of random.

    Attributes:
        seed: of the scores.
    """

    seed: int = 0


@register("random")
class Random(Compressor):
    """See the module's docstring."""

    settings: RandomSettings
    settings_type = RandomSettings

    def rank(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> tuple[Ranked, Ranked]:
        """By chance. See `Compressor.rank`."""
        scores = random_scores(layout, self.settings.seed)
        return self.ranked(Modality.VIDEO, scores, layout, None), self.ranked(Modality.AUDIO, scores, layout, None)

    def official_counts(self, modality: Modality, layout: TokenLayout, sizes: np.ndarray) -> np.ndarray:
        """max(floor(ratio * n), 1); nothing of nothing."""
        return np.maximum(floor_product(sizes, self.ratio_of(modality)), np.minimum(sizes, 1))


def random_scores(layout: TokenLayout, seed: int) -> Tensor:
    """[B, S] float32, 0 outside video and audio; the same for a token in every batch."""
    generator = torch.Generator().manual_seed(seed)
    # One row per ordinal: a longer batch appends rows and changes none.
    draws = torch.rand(layout.length, len(MEDIA), generator=generator).numpy()
    scores = np.zeros(layout.modality.shape, dtype=np.float32)
    for column, modality in enumerate(MEDIA):
        member = layout.modality == modality
        scores += np.where(member, draws[np.cumsum(member, axis=1) - 1, column], 0)
    return torch.from_numpy(scores).to(layout.device, non_blocking=True)
