"""What learned compressors share: a training-free method to start from.

With a base, a token's score is its place in the base's order plus a difference that the network learns, and how many
tokens of each segment stay is the base's own decision (OmniZip's video budgets follow the audio that OmniZip itself
would keep). The layers that give the difference begin as zeros, so an untrained compressor keeps exactly what its base
keeps. Places are spread evenly over each of the base's segments with unit variance: a difference of one moves a token
by about 29 % of its segment, whatever the scale of the base's own scores, and one of 3.5 from its end to its front.

Only the choice is taken over. What a base merges into kept tokens is not: a merge would follow the base's choice, not
the learned one, and the `masked` route has none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from omnisieve.compressors.base import (
    Budget,
    Compressor,
    CompressorError,
    Need,
    Needs,
    Settings,
    build_compressor,
    compressor_type,
    list_compressors,
)
from omnisieve.compressors.ranked import Ranked
from omnisieve.compressors.ratios import RATIOS
from omnisieve.layout import Modality, TokenLayout


@dataclass(frozen=True, kw_only=True)
class LearnedSettings(Settings):
    """Settings of every learned method.

    Attributes:
        base: the training-free method that the compressor starts as and that gives counts per segment; None starts
            from random weights and even counts. It costs what the method costs.
        base_settings: fields of the base; its ratios are those of the compressor.
    """

    base: str | None = None
    base_settings: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base is None:
            if self.base_settings:
                raise CompressorError(f"base_settings {self.base_settings} are given without a base; name it in base")
            return
        if not can_be_base(self.base):
            known = ", ".join(name for name in list_compressors() if can_be_base(name))
            raise CompressorError(
                f"base is {self.base!r}, which cannot be split into counts and an order of tokens before the LLM; "
                f"choose one of {known}"
            )
        if self.rounding == "official":
            raise CompressorError("rounding 'official' is that of the published method, which has no base: leave it")
        if own := sorted({*RATIOS, "rounding"} & set(self.base_settings or {})):
            raise CompressorError(f"base_settings: {own[0]} of the base is that of the compressor; leave it out")


def can_be_base(name: str) -> bool:
    """Whether a method is training-free and has an order of tokens.

    Raises:
        CompressorError: there is no such method; names the nearest.
    """
    method = compressor_type(name)
    return not method.learned and method.rank is not Compressor.rank


class LearnedCompressor(Compressor):
    """A method with parameters; see the module's docstring."""

    settings: LearnedSettings
    settings_type: ClassVar[type[Settings]] = LearnedSettings
    learned = True

    def __init__(self, settings: LearnedSettings) -> None:
        super().__init__(settings)
        # Its settings are checked now.
        _ = self.base

    @property
    def base(self) -> Compressor | None:
        """The method it starts as, at the ratios of this compressor."""
        s = self.settings
        if s.base is None:
            return None
        return build_compressor(s.base, **{name: getattr(s, name) for name in RATIOS}, **(s.base_settings or {}))

    @property
    def needs(self) -> tuple[Need, ...]:
        """Those of the base."""
        return () if self.base is None else self.base.rank_needs

    def asked(self, layout: TokenLayout) -> Budget:
        """See `Compressor.asked`; with a base its budget, so that audio stays whole where the base leaves it so."""
        return super().asked(layout) if self.base is None else self.base.asked(layout)

    @torch.no_grad()
    def base_order(
        self, embeds: Tensor, layout: TokenLayout, needs: Needs | None
    ) -> tuple[Ranked, Ranked] | tuple[None, None]:
        """How the base splits its decision, video and audio. See `Compressor.rank`."""
        return (None, None) if self.base is None else self.base.rank(embeds, layout, needs)

    def refined(self, modality: Modality, logits: Tensor, layout: TokenLayout, start: Ranked | None) -> Ranked:
        """Tokens by logits [B, S], which are added to the order of the base if there is one."""
        if start is None:
            return self.ranked(modality, logits, layout, 1.0)
        # Single precision holds every place of a long segment, which half precision does not.
        return replace(start, scores=start.even_scores() + logits.float(), scale=1.0)


def begin_at_zero(layer: nn.Module) -> None:
    """Make a layer give zeros, until it is trained."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
