"""A limit on the tokens of a sample before compression, and what becomes of samples above it.

Above the limit, videos are read at a lower frame rate, or the sample is refused, and then replaced as an unreadable one
is. What the files hold is looked up first, so a clip that is too long anyway is not decoded for nothing, and one that
can be read more thinly is decoded once. What counts is the sample that was read: none above the limit is handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from omnisieve.data.batch import LoweredFps, Sample
from omnisieve.data.errors import SampleError
from omnisieve.data.manifest import Conversation
from omnisieve.data.tokens import ImageRun, Run, TokenRules, VideoRun

if TYPE_CHECKING:
    from omnisieve.data.dataset import MediaLoader

_CURE = "cut the clip, lower data.max_pixels or data.audio.max_seconds, or raise data.max_tokens"
_THINNER = (
    "read such samples more thinly by data.too_long=lower_fps, lower data.fps or data.max_frames (or data."
    "total_pixels, which long videos fill up)"
)
# Tokens by which a sound may be off, because the end that its file states may be.
_SOUND_SLACK = 2
_ROUNDING = 1e-9


class TooLongError(SampleError):
    """A sample above the limit."""

    def __init__(self, file: str, reason: str, cure: str) -> None:
        super().__init__(file, "too_long", reason, cure)
        self.args = file, reason, cure  # what a copy in another process is made from


@dataclass(frozen=True)
class LengthLimit:
    """Reads samples that keep to a limit.

    Attributes:
        max_tokens: of a whole sample, text and media, before compression.
        lower_fps: read the videos of longer samples at a lower frame rate.
    """

    max_tokens: int
    lower_fps: bool = False

    def read(self, conversation: Conversation, loader: MediaLoader) -> Sample:
        """A sample within the limit; `Sample.lowered` says if its videos were read more thinly for it.

        Raises:
            TooLongError: it cannot be brought within the limit. SampleError: it cannot be used at all.
        """
        if loader.cache is not None:  # nothing is decoded, so nothing is to be saved by looking first
            sample = _load(conversation, loader)
            self._check(conversation, len(sample.input_ids))
            return sample
        glances = [loader.glance(part) for part in conversation.media]
        runs = [medium.run for medium in glances]
        videos = _Videos(runs if self.lower_fps else [], loader.preprocessor.rules)
        whole = len(loader.sample(conversation, glances).input_ids)
        slack = _SOUND_SLACK * sum(not isinstance(run, ImageRun) for run in runs)
        steps = videos.fewer(whole - self.max_tokens)
        self._check(conversation, whole - videos.saved(steps) - slack)
        pixels = loader.preprocessor.frame_pixels
        sample = _load(videos.thinned(conversation, steps, pixels), loader)
        # Now the length of the sound is known for certain.
        whole = len(sample.input_ids) + videos.saved(steps)
        certain = videos.fewer(whole - self.max_tokens)
        if not np.array_equal(certain, steps):
            steps, sample = certain, _load(videos.thinned(conversation, certain, pixels), loader)
        self._check(conversation, len(sample.input_ids))
        return replace(sample, lowered=videos.lowered(conversation, steps, sample, whole))

    def _check(self, conversation: Conversation, tokens: int) -> None:
        if tokens > self.max_tokens:
            fewest, cure = (" with the fewest frames", _CURE) if self.lower_fps else ("", f"{_THINNER}, {_CURE}")
            raise TooLongError(
                conversation.file, f"{tokens} tokens{fewest}, above data.max_tokens {self.max_tokens}", cure
            )


class _Videos:
    """Those of one sample.

    Attributes:
        steps: [V], temporal grid steps of each at its full frame rate. sizes: [V], tokens of a step.
    """

    def __init__(self, runs: Sequence[Run], rules: TokenRules) -> None:
        self._runs = [run for run in runs if isinstance(run, VideoRun)]
        self._places = [place for place, run in enumerate(runs) if isinstance(run, VideoRun)]
        self._frames = rules.temporal_patch_size
        grids = np.array([run.grid for run in self._runs], dtype=np.int64).reshape(-1, 3)
        self.steps, self.sizes = grids[:, 0], grids[:, 1] * grids[:, 2] // rules.spatial_merge_size**2

    def saved(self, steps: np.ndarray) -> int:
        """Tokens less, with so many steps of each."""
        return int((self.steps - steps) @ self.sizes)

    def fewer(self, excess: int) -> np.ndarray:
        """The most steps of each, [V], in one common proportion, that save `excess` tokens; one if nothing does."""
        if excess <= 0 or not len(self.steps):
            return self.steps
        # The proportions at which some video loses a step.
        shares = np.unique(np.concatenate([np.arange(1, count + 1) / count for count in self.steps]))[::-1]
        options = np.maximum(np.floor(np.outer(shares, self.steps) + _ROUNDING), 1).astype(np.int64)
        enough = (self.steps - options) @ self.sizes >= excess
        return options[int(np.argmax(enough))] if enough.any() else options[-1]

    def thinned(
        self, conversation: Conversation, steps: np.ndarray, frame_pixels: Callable[[int], int]
    ) -> Conversation:
        """The conversation, with so many steps of its videos; over their whole length, and in the same resolution.

        Args:
            conversation: whole.
            steps: [V].
            frame_pixels: see `Preprocessor.frame_pixels`.
        """
        media = list(conversation.media)
        for place, count, whole in zip(self._places, steps.tolist(), self.steps.tolist(), strict=True):
            if count < whole:
                pixels = frame_pixels(whole * self._frames)
                media[place] = replace(media[place], max_frames=count * self._frames, max_pixels=pixels)
        return replace(conversation, media=tuple(media))

    def lowered(
        self, conversation: Conversation, steps: np.ndarray, sample: Sample, tokens_was: int
    ) -> LoweredFps | None:
        """What to report of a sample that was read with so many steps; None if these are all."""
        if np.array_equal(steps, self.steps):
            return None
        return LoweredFps(
            sample.id,
            paths=tuple(str(conversation.media[place].path) for place in self._places),
            fps_was=tuple(self._frames / run.seconds_per_grid for run in self._runs),
            fps=tuple(self._frames / seconds for seconds in sample.seconds_per_grid),
            tokens_was=tokens_was,
            tokens=len(sample.input_ids),
        )


def _load(conversation: Conversation, loader: MediaLoader) -> Sample:
    return loader.sample(conversation, loader.load(conversation))
