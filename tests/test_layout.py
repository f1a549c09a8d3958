"""What a layout says about tokens, checked against plain loops over every kind of sample."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisieve.data.tokens import Qwen3OmniRules, TokenRules, VideoRun, expand
from omnisieve.layout import MEDIA, Modality, TokenLayout
from tests.layouts import FAMILIES, IDS_PER_WINDOW, QWEN3, LayoutSpec, make_layout, make_map, specs

batches = st.lists(specs, min_size=1, max_size=3)
sides = st.sampled_from(["left", "right"])
many = settings(max_examples=60, deadline=None)


def media_tokens(layout: TokenLayout, modality: Modality):
    """(sample, position) of every token of a modality."""
    return [(int(b), int(p)) for b, p in zip(*np.nonzero(layout.modality == modality), strict=True)]


def grouped(layout: TokenLayout, modality: Modality, key) -> list[list[list[int]]]:
    """Positions per sample and segment, segments in order of first appearance."""
    samples: list[dict] = [defaultdict(list) for _ in range(layout.batch_size)]
    for b, p in media_tokens(layout, modality):
        samples[b][key(b, p)].append(p)
    return [list(sample.values()) for sample in samples]


def listed(segments) -> list[list[list[int]]]:
    """The same of `Segments`, empty ones left out."""
    return [
        [index[valid].tolist() for index, valid in zip(*sample, strict=True) if valid.any()]
        for sample in zip(segments.index, segments.valid, strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("grids_per_window", "audio"), [(2, True), (4, True), (2, False)])
def test_layouts_of_tests_are_those_of_the_families(family: str, grids_per_window: int, audio: bool) -> None:
    """At the audio rate of the family; start and end tokens of a sounding video count as text."""
    text, video = 2, 3
    rules = (Qwen3OmniRules if family == QWEN3 else TokenRules)(1, video, 4, 5, 6)
    windows, rate = 3, IDS_PER_WINDOW[family]
    run = VideoRun((windows * grids_per_window, 4, 6), 2 / grids_per_window, windows * rate * audio)
    expected = expand(np.array([text] * (6 - audio) + [video] + [text] * (7 - audio)), [run], rules).tokens
    spec = LayoutSpec(windows, grids_per_window, rows=2, columns=3, audio_per_window=rate, audio=audio, text=6)
    found = make_map(spec, family)
    for name in ("modality", "item", "frame", "row", "column", "time", "stream"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


@given(batches, sides, st.integers(0, 3))
@many
def test_padding_goes_where_it_was_asked(samples: list[LayoutSpec], side: str, spare: int) -> None:
    maps = [make_map(spec) for spec in samples]
    length = max(max(len(m) for m in maps), 1) + spare
    layout = TokenLayout.stack(maps, length=length, padding_side=side)
    assert (layout.batch_size, layout.length) == (len(samples), length)
    for row, token_map in enumerate(maps):
        place = slice(0, len(token_map)) if side == "right" else slice(length - len(token_map), length)
        for name in ("modality", "item", "frame", "row", "column", "time", "stream"):
            np.testing.assert_array_equal(getattr(layout, name)[row, place], getattr(token_map, name))
        assert (layout.modality[row] == Modality.PADDING).sum() == length - len(token_map)


def test_too_short_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter than the longest sample"):
        make_layout(LayoutSpec(), length=10)


@given(batches, sides)
@many
def test_windows_are_cut_by_time_and_shared_by_both_modalities(samples: list[LayoutSpec], side: str) -> None:
    layout = make_layout(*samples, padding_side=side)
    window = {(b, p): int(layout.window[b, p]) for m in MEDIA for b, p in media_tokens(layout, m)}
    moment = {(b, p): (int(layout.stream[b, p]), int(layout.time[b, p]) // 50) for b, p in window}
    for sample in range(layout.batch_size):
        pairs = {(window[t], moment[t]) for t in window if t[0] == sample}
        # One number per moment, counted from 0 without gaps in the order of time.
        assert [number for number, _ in sorted(pairs)] == list(range(len(pairs)))
        assert sorted(pairs) == sorted(pairs, key=lambda pair: pair[1])
    assert (layout.window[~np.isin(layout.modality, MEDIA)] == -1).all()
    for modality in MEDIA:
        segments = layout.segments("window", modality)
        for b, p in media_tokens(layout, modality):
            number = window[b, p]
            assert p in segments.index[b, number][segments.valid[b, number]]


@given(batches, sides, st.integers(1, 5))
@many
def test_segments_are_what_their_kinds_say(samples: list[LayoutSpec], side: str, size: int) -> None:
    layout = make_layout(*samples, padding_side=side)
    for modality in MEDIA:
        ordinal = {(b, p): int((layout.modality[b, :p] == modality).sum()) for b, p in media_tokens(layout, modality)}
        keys = {
            "frame": lambda b, p: (layout.item[b, p], layout.frame[b, p]),
            "frames": lambda b, p: (layout.item[b, p], layout.frame[b, p] // size),
            "window": lambda b, p: layout.window[b, p],
            "flat": lambda b, p, ordinal=ordinal: ordinal[b, p] // size,
            "run": lambda b, p, ordinal=ordinal: p - ordinal[b, p],
            "all": lambda b, p: 0,
        }
        for kind, key in keys.items():
            segments = layout.segments(kind, modality, size if kind in ("frames", "flat") else None)
            assert listed(segments) == grouped(layout, modality, key), kind
            np.testing.assert_array_equal(segments.sizes, segments.valid.sum(-1))
            assert segments.sizes.sum() == layout.counts(modality).sum()


@given(batches, sides)
@many
def test_scatter_undoes_gather(samples: list[LayoutSpec], side: str) -> None:
    layout = make_layout(*samples, padding_side=side)
    values = torch.arange(1.0, layout.batch_size * layout.length + 1).reshape(layout.batch_size, layout.length)
    for modality in MEDIA:
        for kind in ("window", "frame", "run", "all"):
            segments = layout.segments(kind, modality)
            expected = values.where(layout.mask(modality), -7.0)
            assert torch.equal(segments.scatter(segments.gather(values), -7.0), expected)
            pairs = torch.stack([values, -values], dim=-1)
            assert torch.equal(segments.gather(pairs)[..., 1], -segments.gather(values))


@given(batches, sides)
@many
def test_places_count_an_items_segments(samples: list[LayoutSpec], side: str) -> None:
    layout = make_layout(*samples, padding_side=side)
    for modality, kind in ((Modality.VIDEO, "frame"), (Modality.VIDEO, "window"), (Modality.AUDIO, "window")):
        segments = layout.segments(kind, modality)
        places = layout.places(segments)
        for b, g in zip(*np.nonzero(segments.sizes), strict=True):
            first = segments.index[b, g][segments.valid[b, g]][0]
            assert segments.first[b, g] == first
            if kind == "frame":
                assert places[b, g] == layout.frame[b, first]
            else:
                own = (layout.modality[b] == modality) & (layout.item[b] == layout.item[b, first])
                assert places[b, g] == g - layout.window[b, own].min()


@given(batches, sides)
@many
def test_the_previous_token_sits_one_frame_earlier_at_the_same_place(samples: list[LayoutSpec], side: str) -> None:
    layout = make_layout(*samples, padding_side=side)
    place = {}
    for b, p in media_tokens(layout, Modality.VIDEO):
        place[(b, *(int(m[b, p]) for m in (layout.item, layout.frame, layout.row, layout.column)))] = p
    for within in ("window", "item"):
        previous = layout.previous_frame_token(within)
        assert (previous[~layout.mask(Modality.VIDEO)] == -1).all()
        for (b, item, frame, row, column), p in place.items():
            expected = place.get((b, item, frame - 1, row, column), -1)
            if within == "window" and expected >= 0 and layout.window[b, expected] != layout.window[b, p]:
                expected = -1
            assert previous[b, p] == expected


@given(batches, sides)
@many
def test_the_canvas_places_tokens_by_row_and_column(samples: list[LayoutSpec], side: str) -> None:
    layout = make_layout(*samples, padding_side=side)
    canvas, height, width = layout.canvas()
    assert canvas.index.shape[-1] == height * width
    assert canvas.valid.sum() == layout.counts(Modality.VIDEO).sum()
    for b, frame, cell in canvas.valid.nonzero().tolist():
        p = int(canvas.index[b, frame, cell])
        assert layout.modality[b, p] == Modality.VIDEO
        assert (layout.row[b, p], layout.column[b, p]) == divmod(cell, width)


def test_a_capped_frame_rate_leaves_windows_with_sound_only() -> None:
    layout = make_layout(LayoutSpec(windows=4, grid_every=2))
    assert (layout.segments("window", Modality.VIDEO).sizes > 0).tolist() == [[True, False, True, False]]
    assert (layout.segments("window", Modality.AUDIO).sizes > 0).all()


@given(batches, sides)
@many
def test_pairs_of_grids_are_windows_that_hold_two_grids_of_a_video(samples: list[LayoutSpec], side: str) -> None:
    layout = make_layout(*samples, padding_side=side)
    paired = layout.by_grid_pairs()
    for row in range(layout.batch_size):
        video, audio = (layout.modality[row] == m for m in (Modality.VIDEO, Modality.AUDIO))
        assert ((paired.window[row] >= 0) == (video | audio)).all()
        moment = layout.stream[row] * 10**6 + layout.time[row]
        begins = {}
        for window in np.unique(paired.window[row, video]):
            members = video & (paired.window[row] == window)
            assert len(np.unique(layout.item[row, members])) == 1
            frames = np.unique(layout.frame[row, members])
            assert frames[0] % 2 == 0
            assert (frames == frames[0] + np.arange(len(frames))).all()
            assert len(frames) <= 2
            begins[window] = moment[members].min()
        for place in np.flatnonzero(audio):
            before = [window for window, begin in begins.items() if begin <= moment[place]]
            own = paired.window[row, place]
            assert own == max(before) if before else own not in begins


@given(specs, sides)
@settings(max_examples=40, deadline=None)
def test_pairs_of_grids_are_2_s_windows_unless_grids_are_spread_out(spec: LayoutSpec, side: str) -> None:
    spec = replace(spec, grids_per_window=2, grid_every=1, odd_grids=False, video=True, separate_audio=False)
    layout = make_layout(spec, padding_side=side)
    np.testing.assert_array_equal(layout.by_grid_pairs().window, layout.window)


def test_a_separate_audio_file_has_windows_of_its_own() -> None:
    layout = make_layout(LayoutSpec(windows=2, separate_audio=True))
    video, audio = (layout.segments("window", m).sizes for m in MEDIA)
    assert ((video > 0) & (audio > 0)).sum() == 0
    together = make_layout(LayoutSpec(windows=2))
    video, audio = (together.segments("window", m).sizes for m in MEDIA)
    assert ((video > 0) & (audio > 0)).all()


def test_segments_of_some_tokens_need_a_size() -> None:
    with pytest.raises(ValueError, match="need size"):
        make_layout(LayoutSpec()).segments("flat", Modality.VIDEO)


def test_select_repeats_samples_as_beams_do() -> None:
    layout = make_layout(LayoutSpec(), LayoutSpec(windows=1, audio=False))
    beams = layout.select(np.array([1, 1, 0]))
    np.testing.assert_array_equal(beams.counts(*MEDIA), layout.counts(*MEDIA)[[1, 1, 0]])
    np.testing.assert_array_equal(beams.window[2], layout.window[0])


def test_samples_are_called_by_their_ids() -> None:
    maps = [make_map(LayoutSpec(windows=1)) for _ in range(2)]
    named = TokenLayout.stack(maps, names=["a", "b"])
    assert named.select(np.array([1, 1, 0])).to("cpu").names == ("b", "b", "a")
    assert [named.name_of(1), TokenLayout.stack(maps).name_of(1)] == ["b", "1"]


def test_uploads_are_made_once() -> None:
    layout = make_layout(LayoutSpec())
    assert layout.segments("window", Modality.VIDEO) is layout.segments("window", Modality.VIDEO)
    assert layout.mask(Modality.VIDEO) is layout.mask(Modality.VIDEO)
    assert layout.to("meta").mask(Modality.VIDEO).is_meta


@many
@given(batches, sides, st.integers(0, 3))
def test_noise_of_a_sample_depends_on_nothing_else(samples, side, seed):
    names = [f"clip {i}" for i in range(len(samples))]
    together = replace(make_layout(*samples, padding_side=side), names=tuple(names))
    for row, (name, sample) in enumerate(zip(names, samples, strict=True)):
        alone = replace(make_layout(sample), names=(name,)).noise(seed)
        assert torch.equal(together.noise(seed)[row][together.modality[row] > 0], alone[0])
    assert not torch.equal(together.noise(seed), together.noise(seed + 1))
