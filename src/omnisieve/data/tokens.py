"""From a rendered conversation and the sizes of its media to tokens, rope positions and the token map.

All three come from one description of the sample, computed once, so they cannot disagree. They equal what the
stock processor and `get_rope_index` of the model family give wherever those can express the sample; a batch that
mixes silent and sounding videos they cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from omnisieve.data.errors import DataError
from omnisieve.layout import Modality, TokenMap

IGNORED = -100
"""Label of a token that is not supervised."""
_ID_SLACK = 1 / 64
"""Temporal ids of long sequences in single precision are this exact."""


@dataclass(frozen=True)
class TokenRules:
    """How Qwen2.5-Omni turns media into tokens; other families are subclasses.

    Attributes:
        image_token_id, video_token_id, audio_token_id: placeholders of one token each.
        audio_start_token_id, audio_end_token_id: they enclose the interleaved run of a video with sound.
        spatial_merge_size: patches merged to one token, per side.
        temporal_patch_size: raw frames in one temporal grid step.
        ids_per_second: temporal rope ids per second.
        seconds_per_chunk: length of a window, here also of a chunk in the interleaving of video and sound.
        position_type: of rope positions; whole numbers here.
    """

    image_token_id: int
    video_token_id: int
    audio_token_id: int
    audio_start_token_id: int
    audio_end_token_id: int
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    ids_per_second: int = 25
    seconds_per_chunk: float = 2
    position_type: ClassVar[Any] = np.int64

    @property
    def ids_per_chunk(self) -> int:
        """Temporal rope ids in one chunk, which is one window of the layout."""
        return int(self.ids_per_second * self.seconds_per_chunk)

    def audio_tokens(self, mel_frames: int) -> int:
        """Audio tokens of so many mel frames: two strides of two; 0 below 3 frames."""
        return max(((mel_frames - 1) // 2 - 1) // 2 + 1, 0)

    def temporal_ids(self, grid: np.ndarray, seconds_per_grid: float) -> np.ndarray:
        """Temporal rope ids of grid steps, in single precision and cut to `position_type` as in the stock model."""
        seconds = grid.astype(np.float32) * np.float32(seconds_per_grid)
        return (seconds * np.float32(self.ids_per_second)).astype(self.position_type)

    def interleave(self, video: _Piece, audio: _Piece) -> list[_Piece]:
        """A video and its sound with their start and end tokens."""
        return [_by_chunks(video, audio, self)]


@dataclass(frozen=True)
class Qwen3OmniRules(TokenRules):
    """How Qwen3-Omni turns media into tokens: 13 audio tokens and rope ids per second, and ids may be fractions."""

    ids_per_second: int = 13
    position_type: ClassVar[Any] = np.float32

    def audio_tokens(self, mel_frames: int) -> int:
        """Audio tokens of so many mel frames: every 100 are convolved apart, with three strides of two."""
        seconds, rest = divmod(mel_frames, 100)
        return 13 * seconds + -(-rest // 8)

    def interleave(self, video: _Piece, audio: _Piece) -> list[_Piece]:
        """Tokens one by one in the order of their temporal ids, between a start and an end token that count as text."""
        start, end = self.audio_start_token_id, self.audio_end_token_id
        return [_text(np.array([start])), _token_by_token(video, audio), _text(np.array([end]))]


@dataclass(frozen=True)
class ImageRun:
    """Size of an image: `grid` is (1, h, w) in patches."""

    grid: tuple[int, int, int]


@dataclass(frozen=True)
class VideoRun:
    """Size of a video: `grid` is (t, h, w) in patches; `audio_tokens` of its own sound, 0 for none."""

    grid: tuple[int, int, int]
    seconds_per_grid: float
    audio_tokens: int = 0


@dataclass(frozen=True)
class AudioRun:
    """Size of an audio file."""

    tokens: int


Run = ImageRun | VideoRun | AudioRun


@dataclass(frozen=True)
class TokenSequence:
    """One sample: ids [S], labels [S] (int64 each), rope positions [3, S] and the map of its tokens."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    tokens: TokenMap


@dataclass(frozen=True)
class _Piece:
    """A stretch of the sequence; positions count from 0.

    Attributes:
        ids: [n] token ids. positions: [3, n]. columns: [7, n], the fields of `TokenMap`.
        tail: the tokens behind whose largest position the next piece starts.
    """

    ids: np.ndarray
    positions: np.ndarray
    columns: np.ndarray
    tail: slice = field(default_factory=lambda: slice(None))


def expand(ids: np.ndarray, runs: Sequence[Run], rules: TokenRules, labels: np.ndarray | None = None) -> TokenSequence:
    """Replace each placeholder of a rendered conversation by the tokens of its medium.

    Args:
        ids: [n], one placeholder per medium.
        runs: the media in the same order.
        rules: of the model family.
        labels: [n]; nothing is supervised when None.

    Raises:
        DataError: placeholders and media do not match.
    """
    labels = np.full(len(ids), IGNORED) if labels is None else labels
    places: list[int] = np.flatnonzero(
        np.isin(ids, [rules.image_token_id, rules.video_token_id, rules.audio_token_id])
    ).tolist()
    _check_placeholders(ids[places], runs, rules)
    pieces: list[_Piece] = []
    out_labels: list[np.ndarray] = []
    item = stream = 0
    done = 0
    for place, run in zip(places, runs, strict=True):
        medium = _medium(run, rules, item, stream)
        pieces += [_text(ids[done:place]), *medium]
        out_labels += [labels[done:place], *(np.full(len(piece.ids), IGNORED) for piece in medium)]
        item += 2 if isinstance(run, VideoRun) and run.audio_tokens else 1
        stream, done = stream + 1, place + 1
    pieces.append(_text(ids[done:]))
    out_labels.append(labels[done:])
    return TokenSequence(
        np.concatenate([piece.ids for piece in pieces]),
        np.concatenate(out_labels),
        _positions(pieces, rules.position_type),
        TokenMap(*np.concatenate([piece.columns for piece in pieces], axis=1)),
    )


def whole_ids(temporal_ids: np.ndarray) -> np.ndarray:
    """Temporal ids without their fractions, int64; a little less than a whole number counts as that number."""
    return np.floor(temporal_ids + _ID_SLACK).astype(np.int64)


def _positions(pieces: Sequence[_Piece], position_type: Any) -> np.ndarray:
    """Rope positions [3, S] of pieces one behind the other, added up in the precision of the stock model."""
    start = position_type(0)
    placed = []
    for piece in pieces:
        placed.append(piece.positions.astype(position_type) + start)
        if len(piece.ids):
            start = placed[-1][:, piece.tail].max() + 1
    return np.maximum(np.concatenate(placed, axis=1), 0)


def _check_placeholders(found: np.ndarray, runs: Sequence[Run], rules: TokenRules) -> None:
    ids = {ImageRun: rules.image_token_id, VideoRun: rules.video_token_id, AudioRun: rules.audio_token_id}
    names = {rules.image_token_id: "image", rules.video_token_id: "video", rules.audio_token_id: "audio"}
    wanted = [ids[type(run)] for run in runs]
    if found.tolist() != wanted:
        raise DataError(
            f"the rendered conversation has placeholders for {[names[i] for i in found.tolist()]}, but its media "
            f"are {[names[i] for i in wanted]}: the chat template must write one placeholder per medium, and "
            "texts must not contain any"
        )


def _text(ids: np.ndarray) -> _Piece:
    count = len(ids)
    columns = np.full((7, count), -1, dtype=np.int64)
    columns[0] = Modality.TEXT
    return _Piece(ids.astype(np.int64), np.tile(np.arange(count), (3, 1)), columns)


def _medium(run: Run, rules: TokenRules, item: int, stream: int) -> list[_Piece]:
    if isinstance(run, AudioRun):
        return [_audio(run.tokens, rules, item, stream)]
    if isinstance(run, ImageRun):
        return [_grid(run.grid, 0.0, Modality.IMAGE, rules, item, stream)]
    video = _grid(run.grid, run.seconds_per_grid, Modality.VIDEO, rules, item, stream)
    if not run.audio_tokens:
        return [video]
    return rules.interleave(video, _audio(run.audio_tokens, rules, item + 1, stream))


def _grid(
    grid: tuple[int, int, int],
    seconds_per_grid: float,
    modality: Modality,
    rules: TokenRules,
    item: int,
    stream: int,
) -> _Piece:
    """Tokens of an image or a silent video, frame by frame, row by row."""
    merge = rules.spatial_merge_size
    frame, row, column = np.indices((grid[0], grid[1] // merge, grid[2] // merge)).reshape(3, -1)
    time = rules.temporal_ids(frame, seconds_per_grid)
    token = rules.image_token_id if modality == Modality.IMAGE else rules.video_token_id
    constants = [np.full_like(frame, value) for value in (modality, item, stream)]
    columns = np.stack([constants[0], constants[1], frame, row, column, whole_ids(time), constants[2]])
    return _Piece(np.full_like(frame, token), np.stack([time, row, column]), columns)


def _audio(count: int, rules: TokenRules, item: int, stream: int) -> _Piece:
    """Tokens of a sound: one rope id each on all axes; on the map they lie in one row."""
    time = np.arange(count)
    zero = np.zeros_like(time)
    columns = np.stack([zero + Modality.AUDIO, zero + item, zero, zero, time, time, zero + stream])
    return _Piece(np.full_like(time, rules.audio_token_id), np.tile(time, (3, 1)), columns)


def _token_by_token(video: _Piece, audio: _Piece) -> _Piece:
    """Merge two pieces by temporal id; a grid goes before the audio token of the same id.

    What follows is placed behind the last tokens of one modality, even if an earlier token of the other reaches
    further.
    """
    positions = np.concatenate([video.positions, audio.positions], axis=1)
    order = np.argsort(positions[0], kind="stable")
    sound = order >= len(video.ids)
    last_run = int(np.flatnonzero(sound != sound[-1])[-1]) + 1
    ids = np.concatenate([video.ids, audio.ids])[order]
    columns = np.concatenate([video.columns, audio.columns], axis=1)[:, order]
    return _Piece(ids, positions[:, order], columns, slice(last_run, None))


def _by_chunks(video: _Piece, audio: _Piece, rules: TokenRules) -> _Piece:
    """[audio start] ([video chunk] [audio chunk])* [audio end], chunk by chunk of temporal ids.

    The start token repeats the position of the token before it and the end token that of the token after it.
    """
    chunk = np.concatenate([_chunks(piece.positions[0], rules.ids_per_chunk) for piece in (video, audio)])
    sound = np.repeat([0, 1], [len(video.ids), len(audio.ids)])
    order = np.argsort(2 * chunk + sound, kind="stable")
    positions = np.concatenate([video.positions, audio.positions], axis=1)[:, order]
    # What follows is placed after the last chunk of the sequence, even if an earlier one reaches further.
    key = (2 * chunk + sound)[order]
    last_chunk = int(np.searchsorted(key, key[-1]))
    marks = _text(np.array([rules.audio_start_token_id, rules.audio_end_token_id]))
    ids = np.concatenate([video.ids, audio.ids])[order]
    columns = np.concatenate([video.columns, audio.columns], axis=1)[:, order]
    first, last = np.full((3, 1), -1), np.full((3, 1), positions[:, last_chunk:].max() + 1)
    return _Piece(
        np.concatenate([marks.ids[:1], ids, marks.ids[1:]]),
        np.concatenate([first, positions, last], axis=1),
        np.concatenate([marks.columns[:, :1], columns, marks.columns[:, 1:]], axis=1),
        slice(1 + last_chunk, -1),
    )


def _chunks(time: np.ndarray, ids_per_chunk: int) -> np.ndarray:
    """Chunk of each token, [n], from its temporal id.

    The stock rule goes at most one chunk further per token, c[i] = min(time[i] // ids, c[i - 1] + 1), so a frame
    after a gap of several chunks is spread over them. The stock processor compares times in double precision and
    the stock model in single precision; where they contradict each other (a grid within 1e-6 of a chunk's edge,
    e.g. the 39th at 2.6 frames per second) this follows the model.
    """
    index = np.arange(len(time))
    return np.minimum.accumulate(time // ids_per_chunk - index) + index
