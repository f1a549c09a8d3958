"""The protocol of a compressor and the registry of methods.

A method is one file: a frozen dataclass of settings, and a class. Most methods score tokens and keep the best of each
segment; they implement `rank` and never count. Others implement `plan`, and `rank` too if they can be split so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from omnisieve.compressors.fields import make_settings, nearest
from omnisieve.compressors.needs import Need, Needs
from omnisieve.compressors.needs import Span as Span
from omnisieve.compressors.presets import Preset, all_presets
from omnisieve.compressors.pretrained import Pretrained
from omnisieve.compressors.ranked import Ranked
from omnisieve.compressors.ratios import (
    RATIOS,
    Budget,
    CompressorError,
    Settings,
    asked_budget,
    check_reach,
    drop_share,
)
from omnisieve.compressors.ratios import UnreachableRatioError as UnreachableRatioError
from omnisieve.layout import MEDIA, Modality, SegmentKind, Segments, TokenLayout
from omnisieve.ops.budget import floor_product, largest_remainder
from omnisieve.ops.topk import Scale
from omnisieve.plan import Merge, Plan


class Compressor(Pretrained, nn.Module):
    """Decides which video and audio tokens the LLM sees.

    Subclasses implement `rank` or `plan` and may override `segments_of`, `official_counts`, `least` and `needs`.
    Training-free methods have no parameters; learned ones are ordinary modules.

    Attributes:
        audio_intact: whether `retained_ratio` alone leaves audio whole, so that video pays for both.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[Settings]] = Settings
    learned: ClassVar[bool] = False
    audio_intact: ClassVar[bool] = False
    segment_kinds: ClassVar[Mapping[Modality, SegmentKind]] = {Modality.VIDEO: "all", Modality.AUDIO: "all"}

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        if settings.retained_ratio is None and settings.video_ratio is None:
            raise CompressorError(f"{self.name}: give retained_ratio, or video_ratio and audio_ratio")
        self.settings = settings

    @property
    def needs(self) -> tuple[Need, ...]:
        """Statistics that `plan` must be given; what nobody declares is not computed."""
        return ()

    def plan(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> Plan:
        """Decide what stays: the best of each segment as `rank` has them, unless overridden.

        Args:
            embeds: [B, S, D] merged embeddings, media rows after the projectors.
            layout: what each token is.
            needs: the tensor of every entry of `self.needs`, see `Need`.
        """
        video, audio = self.rank(embeds, layout, needs)
        scores = torch.where(layout.mask(Modality.VIDEO), video.scores, audio.scores)
        return self.make_plan(layout, video.keep() | audio.keep(), scores=scores)

    def rank(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> tuple[Ranked, Ranked]:
        """Split the decision in two, video and audio: how many of each segment stay, and an order of all its tokens.

        What `plan` keeps is what this keeps. A learned compressor can start from any method that has it, see
        `LearnedCompressor`.

        Raises:
            CompressorError: the method cannot be split so.
        """
        raise CompressorError(f"{self.name} cannot be split into counts per segment and an order of tokens")

    @property
    def rank_needs(self) -> tuple[Need, ...]:
        """Statistics that `rank` must be given: those of `plan`, unless it can do with fewer."""
        return self.needs

    def at(self, **changes: Any) -> Compressor:
        """The same compressor with other settings, sharing the weights; a new ratio replaces all given ratios."""
        if any(name in changes for name in RATIOS):
            changes = dict.fromkeys(RATIOS) | changes
        twin = copy.copy(self)
        twin.settings = replace(self.settings, **changes)
        return twin

    def statistic(self, needs: Needs | None, need: Need) -> Tensor:
        """The tensor of a declared need, [B, S] or [B, S, d_head].

        Raises:
            CompressorError: it was not given.
        """
        if needs is None or need not in needs:
            raise CompressorError(
                f"{self.name} needs {need.kind} of {need.modality.name.lower()} tokens (span {need.span!r}): "
                "pass it to plan in needs={need: tensor}, or attach the compressor to a model, which computes it"
            )
        return needs[need]

    # Budgets: how many, before any score.

    def budget(self, layout: TokenLayout) -> Budget:
        """Kept tokens per sample and modality.

        Raises:
            UnreachableRatioError: the ratios cannot be met on this layout; names the reachable range.
        """
        video, audio = (self.counts_of(modality, layout).sum(axis=1) for modality in MEDIA)
        return Budget(video, audio)

    def counts_of(self, modality: Modality, layout: TokenLayout) -> np.ndarray:
        """Kept tokens per segment of `segments_of`, [B, G] on the host."""
        sizes = self.segments_of(modality, layout).sizes
        if self.settings.rounding == "official":
            return self.official_counts(modality, layout, sizes)
        return largest_remainder(self.asked(layout).of(modality), sizes)

    def asked(self, layout: TokenLayout) -> Budget:
        """The exact budget that the ratios ask for, before it is split over segments.

        Raises:
            UnreachableRatioError: some sample cannot keep so little or so much; names the reachable range.
        """
        budget = asked_budget(self.settings, layout, self.audio_intact)
        low = Budget(self.least(Modality.VIDEO, layout), self.least(Modality.AUDIO, layout))
        check_reach(self.settings, budget, low, layout, self._solved, self.name)
        return budget

    def least(self, modality: Modality, layout: TokenLayout) -> np.ndarray:
        """Fewest tokens of one modality that the method can keep, [B]."""
        return np.zeros(layout.batch_size, dtype=np.int64)

    def official_counts(self, modality: Modality, layout: TokenLayout, sizes: np.ndarray) -> np.ndarray:
        """Kept tokens per segment as the published code rounds, [B, G]: n - int(n * (1 - ratio)) unless overridden."""
        return sizes - floor_product(sizes, drop_share(self.shares_of(modality, layout)))

    def ratio_of(self, modality: Modality) -> float:
        """The kept share of one modality as written in the settings, for published rounding rules."""
        if self.audio_intact and modality == Modality.AUDIO and self.settings.video_ratio is None:
            return self.settings.audio_ratio or 1.0
        return self.settings.ratio_of(modality)

    def shares_of(self, modality: Modality, layout: TokenLayout) -> np.ndarray:
        """The kept share of one modality per sample, [B, 1]: `ratio_of`, or solved from the total and the other's.

        Raises:
            UnreachableRatioError: see `asked`.
        """
        self.asked(layout)
        if modality != self._solved:
            return np.full((layout.batch_size, 1), self.ratio_of(modality))
        other = Modality.AUDIO if modality == Modality.VIDEO else Modality.VIDEO
        kept = self.ratio_of(modality) * layout.counts(*MEDIA) - self.ratio_of(other) * layout.counts(other)
        # Where the rounded total was just reachable, this may fall short by less than a token.
        return (kept / np.maximum(layout.counts(modality), 1)).clip(0, 1)[:, None]

    @property
    def _solved(self) -> Modality | None:
        return self.settings.solved(self.audio_intact)

    # Selection.

    def segments_of(self, modality: Modality, layout: TokenLayout) -> Segments:
        """The segments whose budgets are separate."""
        return layout.segments(self.segment_kinds[modality], modality)

    def ranked(self, modality: Modality, scores: Tensor, layout: TokenLayout, scale: Scale = 0.0) -> Ranked:
        """Tokens by score, and as many of each segment as the budget gives it.

        Args:
            modality: video or audio.
            scores: [B, S].
            layout: of the batch.
            scale: see `Ranked`.
        """
        counts = torch.from_numpy(self.counts_of(modality, layout)).to(scores.device, non_blocking=True)
        return Ranked(self.segments_of(modality, layout), counts, scores, scale)

    def select(self, modality: Modality, scores: Tensor, layout: TokenLayout, scale: Scale = 0.0) -> Tensor:
        """[B, S] bool: what `ranked` keeps."""
        return self.ranked(modality, scores, layout, scale).keep()

    def make_plan(
        self,
        layout: TokenLayout,
        keep_media: Tensor,
        *,
        scores: Tensor | None = None,
        gate: Tensor | None = None,
        merge: Merge | None = None,
    ) -> Plan:
        """A plan from the kept media tokens; text and images are added, never dropped."""
        budget = self.budget(layout)
        fixed = (Modality.TEXT, Modality.IMAGE)
        return Plan(
            keep=keep_media | layout.mask(*fixed),
            kept=budget.total + layout.counts(*fixed),
            exact=budget.exact,
            scores=scores,
            gate=gate,
            merge=merge,
        )


# Registry.

_REGISTRY: dict[str, type[Compressor]] = {}
C = TypeVar("C", bound=type[Compressor])


def register(name: str) -> Callable[[C], C]:
    """Class decorator that makes a method available under `name`."""

    def add(cls: C) -> C:
        if name in _REGISTRY:
            raise CompressorError(f"a compressor named {name!r} is registered already: {_REGISTRY[name].__qualname__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def list_compressors() -> list[str]:
    """Names that `build_compressor` knows."""
    return sorted(_REGISTRY)


def compressor_type(name: str) -> type[Compressor]:
    """The class registered under `name`.

    Raises:
        CompressorError: there is none; names the nearest.
    """
    if name not in _REGISTRY:
        raise CompressorError(f"no compressor is named {name!r}{nearest(name, _REGISTRY)}")
    return _REGISTRY[name]


def list_presets() -> list[str]:
    """Names of settings that papers evaluated with; see `find_preset`."""
    return sorted(all_presets())


def find_preset(name: str) -> Preset:
    """The preset `name`.

    Raises:
        CompressorError: there is none; names the nearest.
    """
    if name not in all_presets():
        raise CompressorError(f"no preset is named {name!r}{nearest(name, all_presets())}")
    return all_presets()[name]


def build_compressor(
    name: str, *, hidden_size: int | None = None, preset: str | None = None, **values: Any
) -> Compressor:
    """Build a method by name.

    Args:
        name: see `list_compressors`.
        hidden_size: D of the LLM; required by learned methods, ignored by others.
        preset: settings of a paper, such as "seats/7b/35"; see `list_presets`.
        **values: fields of the method's settings, `retained_ratio` among them. They win over the preset's; a ratio
            replaces all of its ratios.

    Raises:
        CompressorError: unknown name, preset or field (names the nearest), a value of another type, or one that
            cannot be.
    """
    cls = compressor_type(name)
    if preset is not None:
        values = find_preset(preset).of(name, values)
    settings = make_settings(cls.settings_type, values, name)
    if not cls.learned:
        return cls(settings)
    if hidden_size is None:
        raise CompressorError(f"{name} is learned: give hidden_size, the width of the LLM's embeddings")
    return cls(settings, hidden_size=hidden_size)  # type: ignore[call-arg]
