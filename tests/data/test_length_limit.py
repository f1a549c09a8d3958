"""No sample is longer than the limit; what is lowered is lowered no further than it must be."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisieve.data.batch import BadSample, Sample
from omnisieve.data.collate import collate
from omnisieve.data.dataset import MediaLoader, OmniDataset
from omnisieve.data.length_limit import LengthLimit, TooLongError, _Videos
from omnisieve.data.manifest import Conversation, Manifest
from omnisieve.data.media import MediaError
from omnisieve.data.preprocess import Preprocessor
from omnisieve.data.tokens import AudioRun, Run, VideoRun
from tests.data.media_files import write_faulty
from tests.data.stock import rules, stock_processor

Media = Callable[..., Path]
STEP, SECOND = 8, 25  # tokens of a step of a video of these files, and of a second of sound


@pytest.fixture(scope="module")
def clips(media: Media, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Conversation]:
    """Clips of all lengths, with and without sound, and a broken one."""
    folder = tmp_path_factory.mktemp("limit")
    short, long = media("short2.mp4", seconds=2.0), media("long8.mp4", seconds=8.0)
    silent, sound = media("silent8.mp4", seconds=8.0, audio_seconds=0), media("sound8.mp4", audio_seconds=8.0)
    files = {
        "short": [short], "long": [long], "silent": [silent], "two": [silent, short], "sound": [sound],
        "broken": [write_faulty(folder / "broken.mp4", "half")], "text": [],
    }  # fmt: skip
    lines = [
        {"id": name, "videos": [str(path) for path in paths], "messages": [
            {"role": "user", "content": "<video>" * len(paths) + "What?"}, {"role": "assistant", "content": "A clip."},
        ]}
        for name, paths in files.items()
    ]  # fmt: skip
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {conversation.id: conversation for conversation in Manifest(folder / "m.jsonl")}


@pytest.fixture(scope="module")
def loader() -> Iterator[MediaLoader]:
    loader = MediaLoader(Preprocessor(stock_processor(), rules(), min_pixels=56 * 56, max_pixels=56 * 112))
    yield loader
    loader.reader.close()


@pytest.fixture
def decoded(loader: MediaLoader, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were decoded, in order."""
    names: list[str] = []
    read = loader.reader.read
    monkeypatch.setattr(
        loader.reader, "read", lambda path, **options: names.append(Path(path).stem) or read(path, **options)
    )
    return names


def length(sample: Sample) -> int:
    return len(sample.input_ids)


def plain(clip: Conversation, loader: MediaLoader) -> Sample:
    return loader.sample(clip, loader.load(clip))


def thinner(clip: Conversation, *frames: int) -> Conversation:
    """The clip with such caps on the frames of its videos."""
    media = tuple(replace(part, max_frames=count) for part, count in zip(clip.media, frames, strict=True))
    return replace(clip, media=media)


def assert_same(one: Sample, other: Sample) -> None:
    assert one.video_grids == other.video_grids
    np.testing.assert_array_equal(one.input_ids, other.input_ids)
    np.testing.assert_array_equal(one.position_ids, other.position_ids)
    for found, expected in zip((*one.videos, *one.images), (*other.videos, *other.images), strict=True):
        np.testing.assert_array_equal(found.pixels, expected.pixels)


@pytest.mark.parametrize("name", ["short", "long", "silent", "two", "text"])
@pytest.mark.parametrize("lower_fps", [False, True])
def test_a_sample_that_fits_is_read_once_and_as_it_is(
    clips: dict[str, Conversation], loader: MediaLoader, decoded: list[str], name: str, lower_fps: bool
) -> None:
    whole = plain(clips[name], loader)
    decoded.clear()
    sample = LengthLimit(length(whole), lower_fps).read(clips[name], loader)
    assert_same(sample, whole)
    assert sample.lowered is None
    assert len(decoded) == len(clips[name].media)


def test_a_sample_that_is_too_long_is_not_decoded(
    clips: dict[str, Conversation], loader: MediaLoader, decoded: list[str]
) -> None:
    limit = LengthLimit(length(plain(clips["long"], loader)) - 5)
    decoded.clear()
    with pytest.raises(TooLongError, match=rf"long8\.mp4: \d+ tokens, above data\.max_tokens {limit.max_tokens} "):
        limit.read(clips["long"], loader)
    assert not decoded
    with pytest.raises(TooLongError, match=r"a sample without media.*Cure: .*data\.too_long=lower_fps"):
        LengthLimit(5).read(clips["text"], loader)
    error = TooLongError("a.mp4", "9 tokens", "cut it")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("excess", [1, STEP - 1, STEP, STEP + 1, 5 * STEP])
@pytest.mark.parametrize("name", ["long", "silent"])
def test_the_frame_rate_is_lowered_no_further_than_it_must_be(
    clips: dict[str, Conversation], loader: MediaLoader, decoded: list[str], name: str, excess: int
) -> None:
    whole = plain(clips[name], loader)
    decoded.clear()
    steps = 8 - -(-excess // STEP)
    sample = LengthLimit(length(whole) - excess, lower_fps=True).read(clips[name], loader)
    assert decoded == [f"{name}8"]
    assert_same(sample, plain(thinner(clips[name], 2 * steps), loader))
    assert length(sample) <= length(whole) - excess < length(sample) + STEP
    assert sample.lowered is not None
    assert (sample.lowered.id, sample.lowered.fps_was) == (name, (2.0,))
    assert sample.lowered.fps == pytest.approx([2 * steps / 8], rel=0.01)
    assert (sample.lowered.tokens_was, sample.lowered.tokens) == (length(whole), length(sample))


def test_fewer_frames_are_no_larger_where_the_whole_video_has_a_cap(clips: dict[str, Conversation]) -> None:
    # 16 frames of 2 tokens; 4 frames alone have 8 tokens each.
    tool = Preprocessor(stock_processor(), rules(), min_pixels=28 * 28, max_pixels=56 * 112, total_pixels=8 * 28 * 56)
    loader = MediaLoader(tool)
    whole = plain(clips["silent"], loader)
    assert whole.video_grids == ((8, 2, 4),)
    assert plain(thinner(clips["silent"], 4), loader).video_grids == ((2, 4, 8),)
    sample = LengthLimit(length(whole) - 6 * 2, lower_fps=True).read(clips["silent"], loader)
    assert sample.video_grids == ((2, 2, 4),)
    loader.reader.close()


def test_videos_of_a_sample_are_lowered_in_one_proportion(clips: dict[str, Conversation], loader: MediaLoader) -> None:
    whole = plain(clips["two"], loader)
    half = LengthLimit(length(whole) - 5 * STEP, lower_fps=True).read(clips["two"], loader)
    assert [grid[0] for grid in half.video_grids] == [4, 1]
    fewest = LengthLimit(length(whole) - 8 * STEP, lower_fps=True).read(clips["two"], loader)
    assert [grid[0] for grid in fewest.video_grids] == [1, 1]
    with pytest.raises(TooLongError, match="with the fewest frames"):
        LengthLimit(length(whole) - 8 * STEP - 1, lower_fps=True).read(clips["two"], loader)


def test_sound_that_is_too_long_alone_is_refused(
    clips: dict[str, Conversation], loader: MediaLoader, decoded: list[str]
) -> None:
    with pytest.raises(TooLongError, match="with the fewest frames"):
        LengthLimit(8 * SECOND, lower_fps=True).read(clips["sound"], loader)
    assert not decoded
    with pytest.raises(MediaError, match="truncated"):
        LengthLimit(1000, lower_fps=True).read(clips["broken"], loader)


@pytest.mark.parametrize("error", [-2, 1])
@pytest.mark.parametrize("lower_fps", [False, True])
def test_what_counts_is_the_sample_that_was_read(
    clips: dict[str, Conversation], loader: MediaLoader, monkeypatch: pytest.MonkeyPatch, error: int, lower_fps: bool
) -> None:
    """A file's statement about its sound may be wrong by some tokens; nothing depends on it."""

    def outcome(max_tokens: int) -> tuple[int, int] | None:
        try:
            sample = LengthLimit(max_tokens, lower_fps).read(clips["long"], loader)
        except TooLongError:
            return None
        return length(sample), sample.video_grids[0][0]

    whole = length(plain(clips["long"], loader))
    fewest = whole - 7 * STEP
    limits = [whole, whole - 1, whole - STEP, fewest, fewest - 1]
    expected = [outcome(limit) for limit in limits]
    size = loader.size

    def wrong(info: Any) -> Run:
        run = size(info)
        if isinstance(run, AudioRun):
            return AudioRun(run.tokens + error)
        assert isinstance(run, VideoRun)
        return replace(run, audio_tokens=run.audio_tokens + error)

    monkeypatch.setattr(loader, "size", wrong)
    assert [outcome(limit) for limit in limits] == expected
    assert expected[:2] == [(whole, 8), (whole - STEP, 7) if lower_fps else None]
    assert expected[-2:] == ([(fewest, 1), None] if lower_fps else [None, None])


@pytest.mark.parametrize("lower_fps", [False, True])
def test_too_long_samples_are_replaced_like_broken_ones(
    clips: dict[str, Conversation], loader: MediaLoader, lower_fps: bool
) -> None:
    conversations = list(clips.values())
    limit = LengthLimit(length(plain(clips["short"], loader)) + 4 * STEP, lower_fps)
    dataset = OmniDataset(conversations, loader, on_error="replace", limit=limit)
    samples = [dataset[i] for i in range(len(dataset))]
    assert all(length(sample) <= limit.max_tokens for sample in samples)
    again = [dataset[i] for i in range(len(dataset))]
    assert [(s.id, s.failures, s.lowered) for s in samples] == [(s.id, s.failures, s.lowered) for s in again]
    ids = {conversation.id: sample.id for conversation, sample in zip(conversations, samples, strict=True)}
    replaced = {"long", "sound", "broken"} | (set() if lower_fps else {"two"})
    assert {id for id, found in ids.items() if id != found} == replaced
    assert not replaced & set(ids.values())
    kinds = {bad.id: bad.kind for sample in samples for bad in sample.failures}
    assert kinds == dict.fromkeys(replaced, "too_long") | {"broken": "truncated"}
    batch = collate(samples, pad_token_id=0)
    assert {found.id for found in batch.lowered} == ({"two"} if lower_fps else set())
    with pytest.raises(TooLongError):
        OmniDataset(conversations, loader, limit=limit)[1]


def test_a_sample_that_is_too_long_is_another_fault_than_its_file() -> None:
    one = BadSample("1", "a.mp4", "too_long", "9 tokens", "cut it", "2")
    assert one.key != replace(one, id="3").key
    assert replace(one, kind="empty").key == replace(one, kind="empty", id="3").key


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(-20, 800),
)
def test_steps_are_the_most_that_save_enough(videos: list[tuple[int, int]], excess: int) -> None:
    found = _Videos([VideoRun((steps, 2 * size, 2), 1.0) for steps, size in videos], rules())
    steps = found.fewer(excess)
    whole = np.array([count for count, _ in videos])
    assert ((steps >= 1) & (steps <= whole)).all()
    options = [np.maximum(whole * part // count, 1) for count in whole for part in range(1, count + 1)]
    enough = [option for option in options if found.saved(option) >= excess]
    if not enough:
        np.testing.assert_array_equal(steps, np.ones_like(steps))
    else:
        assert found.saved(steps) >= excess
        assert steps.sum() == max(option.sum() for option in enough)
