"""Manifest lines to samples: decode, preprocess, tokenize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from omnisieve.data.batch import BadSample, Features, Patches, Sample
from omnisieve.data.errors import DataError, SampleError, foreign_errors
from omnisieve.data.feature_cache import FeatureCache
from omnisieve.data.images import read_image
from omnisieve.data.length_limit import LengthLimit
from omnisieve.data.manifest import Conversation, MediaPart, holds
from omnisieve.data.media import MediaError, MediaInfo, MediaReader
from omnisieve.data.preprocess import Preprocessor
from omnisieve.data.protocol import Placement, Protocol
from omnisieve.data.tokens import AudioRun, ImageRun, Run, VideoRun, expand

ATTEMPTS = 64
"""Samples that are tried in one place."""


@dataclass(frozen=True)
class LoadedMedium:
    """One medium, ready for a sample: its size in tokens and its encoder inputs, or its cached encoder outputs."""

    run: Run
    patches: Patches | None = None
    mel: Tensor | None = None
    features: Features | None = None


class MediaLoader:
    """Reads the media of conversations and builds samples of them.

    The two steps are apart so that the questions of one clip share one decoding. Whatever decoders, stock processors
    and the tokenizer raise in them is a `SampleError`.
    """

    def __init__(
        self,
        preprocessor: Preprocessor,
        *,
        fps: float = 2.0,
        min_frames: int = 1,
        max_frames: int | None = None,
        placement: Placement = "steps",
        audio_seconds: float | None = 300.0,
        decode_seconds: float = 60.0,
        cache: FeatureCache | None = None,
    ) -> None:
        """
        Args:
            preprocessor: frames and waveforms to encoder inputs.
            fps, max_frames: sampling of videos whose manifest line says nothing else.
            min_frames, placement: of all videos; see `protocol.Protocol`.
            audio_seconds: longer sound is cut; None: never.
            decode_seconds: wall-clock limit for one file.
            cache: take encoder outputs from here; nothing is decoded then.
        """
        self.preprocessor = preprocessor
        self.fps, self.min_frames, self.max_frames, self.placement = fps, min_frames, max_frames, placement
        self.audio_seconds = audio_seconds
        self.reader = MediaReader(decode_seconds=decode_seconds)
        self.cache = cache

    def preprocessing(self, weights: str) -> dict[str, Any]:
        """What decides the encoders' outputs, for a feature cache; `weights` identifies the encoders' weights."""
        # Caches from before frames could be spread evenly stay valid where they are not.
        even = {"placement": self.placement, "min_frames": self.min_frames} if self.placement != "steps" else {}
        return even | {
            "fps": self.fps,
            "max_frames": self.max_frames,
            "audio_seconds": self.audio_seconds,
            "rules": asdict(self.preprocessor.rules),
            "weights": weights,
            **self.preprocessor.fingerprint(),
        }

    def load(self, conversation: Conversation) -> tuple[LoadedMedium, ...]:
        """The media of a conversation, in order.

        Raises:
            MediaError: a file cannot be used. FeatureCacheError: a file is not in the cache.
        """
        return tuple(self.load_part(part) for part in conversation.media)

    def load_part(self, part: MediaPart) -> LoadedMedium:
        """One medium; see `load`. Whether a video has sound is read from the file."""
        with foreign_media_errors(part):
            if self.cache is None:
                return self._decode(part)
            cached = self.cache.read(part)
            return LoadedMedium(cached.run, features=cached.features)

    def _decode(self, part: MediaPart) -> LoadedMedium:
        if part.kind == "image":
            patches = self.preprocessor.image(read_image(part.path))
            return LoadedMedium(ImageRun(patches.grid), patches)
        clip = self.reader.read(
            part.path, max_seconds=self.audio_seconds, video=part.kind == "video", **sampling_of(part, self)
        )
        mel = None if clip.audio is None else self.preprocessor.audio(clip.audio)
        tokens = 0 if mel is None else self.preprocessor.rules.audio_tokens(mel.shape[1])
        if clip.video is not None:
            patches = self.preprocessor.video(clip.video, part.max_pixels)
            return LoadedMedium(VideoRun(patches.grid, patches.seconds_per_grid, tokens), patches, mel)
        if mel is None:
            raise MediaError(str(part.path), "audio", "no_stream", "there is no sound, or less than 30 ms of it")
        return LoadedMedium(AudioRun(tokens), mel=mel)

    def probe(self, part: MediaPart) -> MediaInfo:
        """What the file of a video or a sound holds, without decoding it.

        Raises:
            MediaError: the file cannot be used.
        """
        return self.reader.probe(part.path, video=part.kind == "video", **sampling_of(part, self))

    def size(self, info: MediaInfo) -> VideoRun | AudioRun:
        """Tokens of a file with such content; of sound to within one or two, as the end that a file states may be."""
        seconds = 0.0 if info.audio is None else info.audio.seconds
        tokens = self.preprocessor.audio_tokens(min(seconds, self.audio_seconds or seconds))
        if info.video is None:
            return AudioRun(tokens)
        video, rules = info.video, self.preprocessor.rules
        grid = self.preprocessor.video_grid(video.sampled, video.height, video.width)
        return VideoRun(grid, video.seconds_per_frame * rules.temporal_patch_size, tokens)

    def glance(self, part: MediaPart) -> LoadedMedium:
        """The size of one medium, from what its file says; of an image all that `load_part` gives.

        Raises:
            MediaError: the file cannot be used.
        """
        if part.kind == "image":
            return self.load_part(part)
        with foreign_media_errors(part):
            return LoadedMedium(self.size(self.probe(part)))

    def sample(
        self, conversation: Conversation, media: Sequence[LoadedMedium], *, generation_prompt: bool = False
    ) -> Sample:
        """Tokens, labels and positions of a conversation around its loaded media.

        Args:
            conversation: whole, or one of its `questions()`.
            media: what `load` gave for it.
            generation_prompt: end with the header of the answer to come.

        Raises:
            SampleError: the text or the chat template does not go with the media.
        """
        runs = [medium.run for medium in media]
        with foreign_errors(conversation.text_error, passing=SampleError):
            if (mark := conversation.mark()) is not None:
                raise conversation.text_error(holds(mark))
            ids, labels = self.preprocessor.chat.encode(conversation.messages, generation_prompt=generation_prompt)
            sequence = expand(ids, runs, self.preprocessor.rules, labels)
        videos = [medium.patches for medium in media if isinstance(medium.run, VideoRun)]
        images = [medium.patches for medium in media if isinstance(medium.run, ImageRun)]
        return Sample(
            id=conversation.id,
            input_ids=torch.from_numpy(sequence.input_ids),
            labels=torch.from_numpy(sequence.labels),
            position_ids=torch.from_numpy(sequence.position_ids),
            tokens=sequence.tokens,
            videos=tuple(patches for patches in videos if patches is not None),
            images=tuple(patches for patches in images if patches is not None),
            audios=tuple(medium.mel for medium in media if medium.mel is not None),
            video_grids=tuple(run.grid for run in runs if isinstance(run, VideoRun)),
            image_grids=tuple(run.grid for run in runs if isinstance(run, ImageRun)),
            seconds_per_grid=tuple(run.seconds_per_grid for run in runs if isinstance(run, VideoRun)),
            features=Features.join([medium.features for medium in media if medium.features is not None]),
            meta=conversation.meta,
        )


class OmniDataset(Dataset[Sample]):
    """Map-style dataset of whole conversations, every answer supervised.

    With `on_error="replace"` a sample that cannot be used is replaced by another one that is a pure function of its
    index, and says so in `Sample.failures`; batches never shrink.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        loader: MediaLoader,
        *,
        on_error: Literal["raise", "replace"] = "raise",
        limit: LengthLimit | None = None,
        check: Callable[[Conversation, Sample], None] | None = None,
    ) -> None:
        """
        Args:
            conversations: e.g. a `Manifest`.
            loader: reads media and builds samples.
            on_error: "raise" or "replace".
            limit: on the tokens of a sample.
            check: raises `SampleError` for a sample that cannot be used although it was read.
        """
        self.loader = loader
        self.check = check
        self.on_error = on_error
        self.limit = limit
        self.conversations = conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Sample:
        failed: list[tuple[str, SampleError]] = []
        for attempt in range(ATTEMPTS):
            conversation = self.conversations[substitute(index, attempt, len(self))]
            try:
                sample = self._read(conversation)
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                failed.append((conversation.id, error))
                continue
            bad = tuple(BadSample(id, e.file, e.kind, e.reason, e.cure, sample.id) for id, e in failed)
            return replace(sample, failures=bad)
        raise DataError(
            f"sample {failed[0][0]} and {ATTEMPTS - 1} others drawn in its place cannot be used; first: {failed[0][1]}"
        )

    def _read(self, conversation: Conversation) -> Sample:
        if self.limit is not None:
            sample = self.limit.read(conversation, self.loader)
        else:
            sample = self.loader.sample(conversation, self.loader.load(conversation))
        if self.check is not None:
            self.check(conversation, sample)
        return sample


def foreign_media_errors(part: MediaPart) -> AbstractContextManager[None]:
    """Whatever is raised inside by code that is not ours is the error of this file."""
    return foreign_errors(partial(MediaError, str(part.path), part.kind, "unusable"))


def sampling_of(part: MediaPart, default: Protocol | MediaLoader) -> dict[str, Any]:
    """How a part is to be sampled, as arguments of `MediaReader.read`: what its manifest line says, else `default`."""
    return {
        "fps": part.fps or default.fps,
        "min_frames": default.min_frames,
        "max_frames": part.max_frames or default.max_frames,
        "placement": default.placement,
        "audio_track": part.audio_track,
    }


def substitute(index: int, attempt: int, length: int) -> int:
    """The sample to try: `index` itself, then others that depend on nothing but it."""
    return index if attempt == 0 else int(np.random.default_rng((index, attempt)).integers(length))
