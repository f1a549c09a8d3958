"""What ratios ask for: the settings every method has, the budget they mean on a layout, and what is out of reach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from omnisieve.layout import MEDIA, Modality, TokenLayout
from omnisieve.ops.budget import largest_remainder, round_count

RATIOS = ("retained_ratio", "video_ratio", "audio_ratio")
Rounding = Literal["exact", "official"]
PUBLISHED_VIDEO_FLOOR = 0.05
"""Least share of the video where audio is to stay whole, in SEATS' code."""
Share = TypeVar("Share", float, np.ndarray)


class CompressorError(ValueError):
    """A compressor was asked for something it cannot do; the message says what and how to cure it."""


class UnreachableRatioError(CompressorError):
    """A method cannot meet the ratio on these samples; the message names the reachable range."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Budget of a compressor. Give `retained_ratio`, or one ratio per modality, or the total and one of the two.

    Attributes:
        retained_ratio: kept media tokens / media tokens, in (0, 1]. Alone, both modalities keep this share; methods
            that leave audio intact keep all of it and solve the video share per sample.
        video_ratio, audio_ratio: kept share of one modality. With `retained_ratio` and one of them the other is
            solved per sample.
        rounding: "exact": the total is met by largest remainder; "official": as the published code rounds.
    """

    retained_ratio: float | None = None
    video_ratio: float | None = None
    audio_ratio: float | None = None
    rounding: Rounding = "exact"

    def __post_init__(self) -> None:
        for name in RATIOS:
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise CompressorError(f"{name} is {value}; it is a kept share and must lie in (0, 1]")
        if self.rounding not in ("exact", "official"):
            raise CompressorError(f"rounding is {self.rounding!r}; choose 'exact' or 'official'")
        given = [r is not None for r in (self.retained_ratio, self.video_ratio, self.audio_ratio)]
        if sum(given) == 3:
            raise CompressorError("retained_ratio, video_ratio and audio_ratio are all given; leave one out")
        if not given[0] and sum(given) == 1:
            raise CompressorError("one of video_ratio and audio_ratio is given alone; add the other or retained_ratio")

    def solved(self, audio_intact: bool) -> Modality | None:
        """The modality whose share follows from the total and from the other's, if there is one.

        Args:
            audio_intact: whether the method leaves audio whole unless told otherwise.
        """
        if self.retained_ratio is None:
            return None
        if self.video_ratio is not None:
            return Modality.AUDIO
        return Modality.VIDEO if self.audio_ratio is not None or audio_intact else None

    def ratio_of(self, modality: Modality) -> float:
        """The share as written: the modality's own, else the common one."""
        own = self.video_ratio if modality == Modality.VIDEO else self.audio_ratio
        ratio = self.retained_ratio if own is None else own
        return 1.0 if ratio is None else ratio


@dataclass(frozen=True)
class Budget:
    """Kept tokens per sample, known from the layout alone.

    Attributes:
        video, audio: [B] int64 on the host.
        exact: False if these are upper bounds (published variants whose count depends on the content).
    """

    video: np.ndarray
    audio: np.ndarray
    exact: bool = True

    @property
    def total(self) -> np.ndarray:
        """Kept media tokens per sample, [B]."""
        return self.video + self.audio

    def of(self, modality: Modality) -> np.ndarray:
        return self.video if modality == Modality.VIDEO else self.audio


def asked_budget(settings: Settings, layout: TokenLayout, audio_intact: bool) -> Budget:
    """The exact budget that the ratios ask for, whether there is as much or not."""
    video, audio = layout.counts(Modality.VIDEO), layout.counts(Modality.AUDIO)
    s, solved = settings, settings.solved(audio_intact)
    if s.retained_ratio is None:
        return Budget(_share(video, s.video_ratio), _share(audio, s.audio_ratio))
    total = _share(video + audio, s.retained_ratio)
    if solved is None:
        return Budget(*largest_remainder(total, np.stack([video, audio], axis=1)).T)
    # A sample without the solved modality has nothing to solve: the other takes the total. Audio that is to stay
    # whole does not.
    if solved == Modality.AUDIO:
        kept_video = np.where(audio > 0, _share(video, s.video_ratio), total)
        return Budget(kept_video, total - kept_video)
    kept_audio = np.where((video > 0) | (s.audio_ratio is None), _share(audio, s.audio_ratio), total)
    return Budget(total - kept_audio, kept_audio)


def check_reach(
    settings: Settings, budget: Budget, low: Budget, layout: TokenLayout, solved: Modality | None, name: str
) -> None:
    """Refuse a budget that some sample does not have or that goes below what the method can do.

    Args:
        settings: what was asked.
        budget: what this means.
        low: the least that the method can keep.
        layout: of the batch.
        solved: see `Settings.solved`; of a solved modality one token stays at least.
        name: of the method.

    Raises:
        UnreachableRatioError: names the first such sample and its reachable range.
    """
    for modality in MEDIA:
        kept, high = budget.of(modality), layout.counts(modality)
        least = np.maximum(low.of(modality), np.minimum(high, modality == solved))
        outside = (kept < least) | (kept > high)
        if not outside.any():
            continue
        sample = int(np.argmax(outside))
        setting, size, rest = f"{modality.name.lower()}_ratio", int(high[sample]), 0
        if getattr(settings, setting) is None:
            setting = "retained_ratio"
            if modality == solved:
                size, rest = int(layout.counts(*MEDIA)[sample]), int((budget.total - kept)[sample])
        lowest = math.ceil(1e4 * (least[sample] + rest) / size) / 1e4
        highest = math.floor(1e4 * (high[sample] + rest) / size) / 1e4
        beside = f" beside {rest} tokens of the other modality" if rest else ""
        raise UnreachableRatioError(
            f"{name}: sample {layout.name_of(sample)} would keep {kept[sample]} of its {high[sample]} "
            f"{modality.name.lower()} tokens{beside}; it can keep {least[sample]} to {high[sample]}, so reachable are "
            f"{lowest} to {highest} ({setting})"
        )


def intact_shares(ratio: float, layout: TokenLayout, video_floor: float) -> dict[Modality, np.ndarray]:
    """Shares that leave audio whole at an unchanged total, as the published code of SEATS solves them, [B, 1] each.

    The total is truncated before video takes what audio leaves of it. Video keeps `video_floor` at least; audio pays
    for the rest then, and is no longer whole.

    Args:
        ratio: kept share of both modalities together.
        layout: of the batch.
        video_floor: least share of the video.
    """
    video, audio = (layout.counts(modality) for modality in MEDIA)
    # Binary fractions included.
    total = np.floor(ratio * video + ratio * audio)
    share = (total - audio) / np.maximum(video, 1)
    rest = ((total - video_floor * video) / np.maximum(audio, 1)).clip(0, 1)
    low = share < video_floor
    shares = {Modality.VIDEO: np.where(low, video_floor, share), Modality.AUDIO: np.where(low, rest, 1.0)}
    return {modality: share[:, None] for modality, share in shares.items()}


def drop_share(ratio: Share) -> Share:
    """The removed fraction that belongs to a kept one, as people write it: 1 - 0.3 is 0.7, not 0.7000000000000001."""
    return np.round(1.0 - ratio, 12)


def _share(counts: np.ndarray, ratio: float | None) -> np.ndarray:
    """Rounded share of `counts`, at least one token where there is any."""
    return np.maximum(round_count(counts * (1.0 if ratio is None else ratio)), np.minimum(counts, 1))
