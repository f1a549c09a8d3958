"""Pictures of what stays: every pixel of a dropped token is dimmed, none of a kept one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omnisieve.compressors.base import Settings
from omnisieve.data.batch import Sample
from omnisieve.data.media import VideoFrames
from omnisieve.data.preprocess import Preprocessor
from omnisieve.data.tokens import AudioRun, VideoRun, expand
from omnisieve.layout import Modality, TokenMap
from omnisieve.training.pictures import (
    WIDTH,
    ClipMedia,
    Film,
    asked_ratio,
    caption,
    clip_media,
    dimmed,
    kept_cells,
    kept_share,
    marked,
    picture,
    spectrogram,
    spread,
    strip,
)
from tests.data.stock import rules, stock_processor
from tests.models import FAMILIES, QWEN2_5

EDGE = np.array([255, 196, 0])


def colourful(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(60, 256, (*shape, 3), dtype=np.uint8)


def sample_of(family: str) -> tuple[Sample, Preprocessor, np.ndarray]:
    """A sounding video and a sound, as they are decoded, and the video's frames."""
    tool = Preprocessor(stock_processor(family), rules(family), min_pixels=56 * 56, max_pixels=64 * 128)
    frames = colourful(8, 64, 128) if family != QWEN2_5 else colourful(8, 56, 112)
    patches = tool.video(VideoFrames(frames, 0.5, 4.0))
    waves = [np.random.default_rng(1).standard_normal(n).astype(np.float32) for n in (64_000, 32_000)]
    mels = [tool.audio(wave) for wave in waves]
    counts = [tool.rules.audio_tokens(mel.shape[1]) for mel in mels if mel is not None]
    runs = [VideoRun(patches.grid, 1.0, counts[0]), AudioRun(counts[1])]
    ids = np.array([90, tool.rules.video_token_id, 91, tool.rules.audio_token_id, 92])
    made = expand(ids, runs, tool.rules)
    nothing = torch.zeros(len(made.input_ids), dtype=torch.long)
    sample = Sample(
        "a clip", nothing, nothing, torch.from_numpy(made.position_ids), made.tokens, videos=(patches,),
        audios=tuple(mel for mel in mels if mel is not None),
    )  # fmt: skip
    return sample, tool, frames


@pytest.mark.parametrize("cells", [np.eye(4, 7, dtype=bool), np.zeros((4, 7), bool), np.ones((4, 7), bool)])
def test_kept_cells_are_left_as_they_are_but_for_their_edge(cells: np.ndarray):
    frame, size = colourful(4 * 30, 7 * 20), (30, 20)
    out = marked(frame, cells)
    grey = dimmed(frame)
    for row, column in np.ndindex(*cells.shape):
        place = tuple(slice(n * k, (n + 1) * k) for n, k in zip((row, column), size, strict=True))
        if not cells[row, column]:
            assert np.array_equal(out[place], grey[place])
            continue
        inner = (slice(1, -1), slice(1, -1))
        assert np.array_equal(out[place][inner], frame[place][inner])
        edge = (out[place] == EDGE).all(-1)
        assert ((out[place] == frame[place]).all(-1) | edge).all()
    assert (out == EDGE).all(-1).any() == cells.any()


def test_dropped_tokens_are_darker_and_grey():
    frame = colourful(5, 5)
    grey = dimmed(frame)
    assert (grey.max(-1) == grey.min(-1)).all()
    assert grey.mean() < 0.6 * frame.mean()


@pytest.mark.parametrize(("height", "width"), [(90, 160), (160, 90), (100, 100)])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_frames_keep_their_proportions(height: int, width: int, count: int):
    film = Film(np.full((count, height, width, 3), 200, np.uint8), range(count), 2.0)
    rows = strip(film, np.zeros((count, 2, 2), dtype=bool))
    assert rows.shape[1:] == (WIDTH, 3)
    shown = (rows == 100).all(-1)  # dimmed
    lengths = [int(shown.any(axis).sum()) for axis in (1, 0)]
    assert lengths[1] / count / lengths[0] == pytest.approx(width / height, rel=0.02)


@pytest.mark.parametrize("columns", [6, 24, 40])
def test_tokens_are_wide_enough_to_be_told_apart(columns: int):
    film = Film(np.full((6, columns * 14, columns * 28, 3), 200, np.uint8), range(6), 2.0)
    shown = (strip(film, np.zeros((6, columns // 2, columns), dtype=bool)) == 100).all(-1)
    edges = np.diff(shown[5].astype(int), prepend=0, append=0)
    widths = np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)
    assert widths.min() >= 11 * columns
    assert widths.max() == widths.min()
    frames = shown.sum() / (widths[0] * widths[0] / 2)
    assert frames == pytest.approx(6, rel=0.01)  # all of them, whole


@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_has_the_cell_and_the_time_that_the_model_gives_it(family: str):
    sample, tool, frames = sample_of(family)
    clip = clip_media(sample, tool, frames=3)
    tokens = clip.tokens
    (film,), (steps, rows, columns) = clip.films, (4, 2, 4)
    assert np.array_equal(film.frames, frames[[0, 4, 6]])
    assert list(film.steps) == [0, 2, 3]
    token = np.flatnonzero((tokens.frame == 2) & (tokens.row == 1) & (tokens.column == 3))
    keep = np.zeros(len(tokens), dtype=bool)
    keep[token] = True
    wanted = np.zeros((steps, rows, columns), dtype=bool)
    wanted[2, 1, 3] = True
    assert np.array_equal(kept_cells(keep, tokens, 0), wanted)
    assert [sound.shape[1] for sound in clip.sounds] == [400, 200]
    # The last token of a sound begins within its last 0.1 s.
    for item, seconds in ((1, 4.0), (2, 2.0)):
        begin = tokens.time[tokens.item == item] / clip.ids_per_second
        assert begin[0] == 0
        assert seconds - 0.1 < begin[-1] < seconds


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_shows_all_media_of_a_clip(family: str):
    sample, tool, _ = sample_of(family)
    clip = clip_media(sample, tool)
    nothing, everything = (np.full(len(sample.tokens), value) for value in (False, True))
    dark, full = (picture(clip, keep, "a clip, step 3") for keep in (nothing, everything))
    assert dark.shape == full.shape
    assert dark.dtype == np.uint8
    assert dark.shape[0] > strip(clip.films[0], np.zeros((4, 2, 4), bool)).shape[0] + 2 * 128
    assert not (dark == EDGE).all(-1).any()
    assert (full == EDGE).all(-1).any()


def test_a_clip_without_video_and_sound_has_its_title():
    words = TokenMap(*np.full((7, 5), int(Modality.TEXT)))
    assert picture(ClipMedia("a clip", words), np.ones(5, bool), "a clip, step 3").shape[0] < 100


def test_a_caption_counts_by_modality():
    sample, _, _ = sample_of(QWEN2_5)
    keep = sample.tokens.modality == Modality.VIDEO
    assert caption(keep, sample.tokens).startswith("video: 32 of 32 tokens kept (100.0 %), audio: 0 of ")


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ({"retained_ratio": 0.25}, "asked ratio all 0.25"),
        ({"retained_ratio": 0.25, "audio_ratio": 0.4}, "asked ratio all 0.25, audio 0.4"),
        ({"video_ratio": 0.1, "audio_ratio": 0.4}, "asked ratio video 0.1, audio 0.4"),
    ],
)
def test_ratios_in_words(ratios: dict[str, float], words: str):
    assert asked_ratio(Settings(**ratios)) == words


def test_kept_spans_lie_where_their_tokens_are():
    seconds = np.arange(10) * 0.04
    keep = np.zeros(10, dtype=bool)
    keep[[0, 5, 9]] = True
    fine = kept_share(keep, seconds, 0.4, 100)
    assert np.array_equal(np.flatnonzero(fine > 0.5), [*range(10), *range(50, 60), *range(90, 100)])
    coarse = kept_share(keep, seconds, 0.4, 2)  # five tokens per column
    np.testing.assert_allclose(coarse, [0.2, 0.4], atol=1e-9)
    np.testing.assert_allclose(kept_share(~keep, seconds, 0.4, 7) + kept_share(keep, seconds, 0.4, 7), 1, atol=1e-9)


def test_a_spectrogram_has_low_tones_below_and_a_bar_of_what_is_kept():
    mel = np.repeat(np.arange(80.0)[:, None], 100, axis=1)  # the highest tones are the loudest
    keep = np.arange(25) < 12
    drawn = spectrogram(mel, keep, np.arange(25) * 0.04, 100.0).astype(int)
    left, right = drawn[:, 100], drawn[:, 800]
    assert left[2].sum() > left[120].sum()
    assert (right[:128].max(-1) == right[:128].min(-1)).all()  # dropped: grey
    assert (left[:100].max(-1) > left[:100].min(-1)).all()
    bar = drawn[132]
    assert bar[100, 1] > bar[100, 0]
    assert bar[800, 0] == bar[800, 1]


def test_a_silent_spectrogram_can_be_drawn():
    assert spectrogram(np.zeros((80, 7)), np.ones(2, bool), np.array([0, 0.04]), 100.0).shape[1] == WIDTH


@pytest.mark.parametrize(("count", "wanted"), [(1, 6), (4, 6), (6, 6), (7, 6), (300, 6)])
def test_frames_are_spread_from_the_first_to_the_last(count: int, wanted: int):
    found = spread(count, wanted)
    assert (found[0], found[-1]) == (0, count - 1)
    assert len(found) == min(count, wanted)
    assert len(found) == 1 or np.ptp(np.diff(found)) <= 1
