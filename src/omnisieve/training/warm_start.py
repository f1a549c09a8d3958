"""Warm start: a compressor learns in which order a method inside the LLM ranks tokens, before it learns anything else.

The teacher is what the method's query rows attend to in the layer where it scores first, over the full sequence. Only
its order counts: within every segment that the compressor's tokens compete in, the teacher's places are spread evenly
with unit variance, as those of a base are (`compressors.learned`), and the loss is KL(softmax(places) ||
softmax(logits)). So a token that takes all attention is the first, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from omnisieve.compressors.inner import Cut, InnerCompressor, InnerSettings
from omnisieve.compressors.ranked import Ranked
from omnisieve.layout import TokenLayout

# Of places without a token: far below every logit, and finite, so that a segment without any has a gradient of zero.
_NOWHERE = -1e9


class Listener(InnerCompressor):
    """Hears what a method inside the LLM hears first: every token gets there, and no media token any further.

    Attributes:
        heard: [B, S] attention scores of the latest forward; None if there was no media token.
    """

    name = "listener"

    def __init__(self, method: InnerCompressor) -> None:
        super().__init__(InnerSettings(retained_ratio=1.0))
        self.method = method
        self.heard: Tensor | None = None

    def cuts(self) -> tuple[Cut, ...]:
        """The first scored one of the method."""
        cuts = self.method.for_depth(self.num_layers).cuts()
        return (next(cut for cut in cuts if cut.score is not None),)

    def counts(self, layout: TokenLayout) -> np.ndarray:
        """None."""
        return np.zeros((1, layout.batch_size), dtype=np.int64)

    def keep_after(self, cut: int, scores: Tensor, alive: Tensor, layout: TokenLayout) -> Tensor:
        """Remember the scores and let go of the tokens, which makes the layers behind cheap."""
        self.heard = scores
        return torch.zeros_like(alive)


def order_loss(parts: Sequence[Ranked], teacher: Tensor) -> Tensor:
    """How far the order of each clip is from the teacher's, [B], as a mean over its tokens.

    Args:
        parts: of the compressor, with logits as scores.
        teacher: [B, S] attention; a segment that receives none teaches nothing.
    """
    total, weight = teacher.new_zeros(len(teacher)), teacher.new_zeros(len(teacher))
    for part in parts:
        segments, valid = part.segments, part.segments.valid
        places = replace(part, scores=teacher).even_scores()
        wanted, found = (
            segments.gather(x.float()).masked_fill(~valid, _NOWHERE).log_softmax(dim=-1) for x in (places, part.scores)
        )
        divergence = (wanted.exp() * (wanted - found)).sum(dim=-1)
        attended = (segments.gather(teacher) * valid).sum(dim=-1) > 0
        tokens = valid.sum(dim=-1) * attended
        total, weight = total + (divergence * tokens).sum(dim=-1), weight + tokens.sum(dim=-1)
    return total / weight.clamp(min=1)


def agreement(parts: Sequence[Ranked], teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that the compressor keeps and the teacher would keep in their segments, too, and tokens that it keeps."""
    kept = [part.keep() for part in parts]
    both = [keep & replace(part, scores=teacher).keep() for keep, part in zip(kept, parts, strict=True)]
    return torch.stack(both).sum(), torch.stack(kept).sum()
