"""Full: every token stays. Timing, FLOPs and memory of the uncompressed model go through the same code path."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from omnisieve.compressors.base import Compressor, Needs, Settings, UnreachableRatioError, register
from omnisieve.layout import MEDIA, TokenLayout
from omnisieve.plan import Plan


@dataclass(frozen=True, kw_only=True)
class FullSettings(Settings):
    """Settings of full; every ratio is 1."""

    retained_ratio: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("retained_ratio", "video_ratio", "audio_ratio"):
            if getattr(self, name) not in (None, 1.0):
                raise UnreachableRatioError(
                    f"full: {name} is {getattr(self, name)}; full keeps every token, reachable is 1 only"
                )
        super().__post_init__()


@register("full")
class Full(Compressor):
    """See the module's docstring."""

    settings_type = FullSettings

    def plan(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> Plan:
        """Keep everything. See `Compressor.plan`."""
        return self.make_plan(layout, layout.mask(*MEDIA))
