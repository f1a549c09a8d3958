from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import _get_feat_extract_output_lengths

from omnisieve.data.chat import ChatFormat
from omnisieve.data.tokens import IGNORED, AudioRun, ImageRun, Run, TokenSequence, VideoRun, expand
from omnisieve.layout import Modality, TokenLayout
from tests.data.stock import rules, stock_positions, stock_processor
from tests.models import FAMILIES, PATCH, QWEN2_5, QWEN3, QWEN3_PATCH

both_families = pytest.mark.parametrize("family", FAMILIES)
GRIDS = st.tuples(st.integers(1, 12), st.sampled_from([2, 4, 6, 8]), st.sampled_from([2, 4, 6]))
SECONDS = st.sampled_from([1.0, 0.5, 0.25, 2 / 3, 0.8, 1.7, 2.0, 2.4, 3.1, 5.0, 7.5])


def chat() -> ChatFormat:
    processor = stock_processor()
    return ChatFormat(processor.tokenizer, processor.chat_template)


def parts(runs: list[Run]) -> list[dict[str, str]]:
    names = {ImageRun: "image", VideoRun: "video", AudioRun: "audio"}
    return [{"type": names[type(run)]} for run in runs]


def conversation(runs: list[Run]) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": "see"}, *parts(runs), {"type": "text", "text": "What was it?"}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]


def sequence(runs: list[Run], family: str = QWEN2_5) -> TokenSequence:
    ids, labels = chat().encode(conversation(runs))
    return expand(ids, runs, rules(family), labels)


def mel_frames(tokens: int, family: str) -> int:
    """A number of mel frames that gives so many audio tokens."""
    return next(n for n in range(4 * tokens, 8 * tokens + 4) if rules(family).audio_tokens(n) == tokens)


def assert_stock_positions(runs: list[Run], family: str, *, sound_in_video: bool) -> None:
    result = sequence(runs, family)
    sounds = [run.tokens if isinstance(run, AudioRun) else getattr(run, "audio_tokens", 0) for run in runs]
    expected = stock_positions(
        torch.from_numpy(result.input_ids),
        [run.grid for run in runs if isinstance(run, VideoRun)],
        [run.grid for run in runs if isinstance(run, ImageRun)],
        [run.seconds_per_grid for run in runs if isinstance(run, VideoRun)],
        [mel_frames(count, family) for count in sounds if count],
        sound_in_video=sound_in_video,
        family=family,
    )
    np.testing.assert_array_equal(result.position_ids, expected.numpy())


@both_families
@settings(max_examples=60, deadline=None, derandomize=True)
@given(grid=GRIDS, seconds=SECONDS, audio=st.integers(1, 700))
@example(grid=(6, 4, 4), seconds=1.0, audio=150)
@example(grid=(6, 4, 4), seconds=1.0, audio=151)  # a tail of sound after the last frame
@example(grid=(5, 4, 4), seconds=1.0, audio=20)  # sound that ends first, with an odd number of grids
@example(grid=(3, 2, 2), seconds=5.0, audio=375)  # windows without a grid
@example(grid=(1, 8, 6), seconds=1.0, audio=1)  # rows and columns reach further than time
def test_positions_of_a_video_with_sound(family: str, grid: tuple[int, int, int], seconds: float, audio: int) -> None:
    assert_stock_positions([VideoRun(grid, seconds, audio)], family, sound_in_video=True)


@both_families
@settings(max_examples=30, deadline=None, derandomize=True)
@given(runs=st.lists(st.builds(VideoRun, GRIDS, SECONDS, st.integers(1, 200)), min_size=2, max_size=3))
def test_positions_of_several_videos_with_sound(family: str, runs: list[Run]) -> None:
    assert_stock_positions(runs, family, sound_in_video=True)


@both_families
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    runs=st.lists(
        st.one_of(
            st.builds(VideoRun, GRIDS, SECONDS),
            st.builds(AudioRun, st.integers(1, 200)),
            st.builds(ImageRun, GRIDS.map(lambda grid: (1, *grid[1:]))),
        ),
        max_size=4,
    )
)
@example(runs=[])
@example(runs=[AudioRun(120)])
@example(runs=[VideoRun((4, 4, 4), 1.0), AudioRun(100)])
@example(runs=[VideoRun((4, 4, 4), 1.0), VideoRun((2, 6, 4), 2.4)])
def test_positions_of_silent_videos_images_and_audio_files(family: str, runs: list[Run]) -> None:
    assert_stock_positions(runs, family, sound_in_video=False)


def test_positions_of_a_video_with_sound_and_an_audio_file() -> None:
    # The stock rule cannot tell the file from a video's sound, but each alone it can: positions only shift.
    both = sequence([VideoRun((4, 4, 4), 1.0, 100), AudioRun(60)])
    video, audio = sequence([VideoRun((4, 4, 4), 1.0, 100)]), sequence([AudioRun(60)])
    eos_eos_bos = 3
    end = int(np.flatnonzero(both.input_ids == rules().audio_end_token_id)[0])
    np.testing.assert_array_equal(both.position_ids[:, : end + 1], video.position_ids[:, : end + 1])
    tail = both.position_ids[:, end + eos_eos_bos - 1 :]
    head = int(np.flatnonzero(audio.input_ids == rules().audio_token_id)[0]) - 1
    np.testing.assert_array_equal(
        tail - tail[:, :1], audio.position_ids[:, head:] - audio.position_ids[:, head : head + 1]
    )


def stock_ids(runs: list[Run], fps: float, family: str) -> np.ndarray:
    """Token ids by the stock processor, from real frames and waveforms of the wanted sizes."""
    processor = stock_processor(family)
    patch = QWEN3_PATCH if family == QWEN3 else PATCH
    size = {"shortest_edge": patch**2, "longest_edge": 2**24}
    videos, images, sounds, sources = [], [], [], []
    for run in runs:
        if isinstance(run, AudioRun):
            sounds.append(np.zeros(mel_frames(run.tokens, family) * 160, dtype=np.float32))
            sources.append(None)
            continue
        frames = 2 * run.grid[0] if isinstance(run, VideoRun) else 1
        picture = torch.zeros(frames, 3, patch * run.grid[1], patch * run.grid[2], dtype=torch.uint8)
        if isinstance(run, ImageRun):
            images.append(picture[0])
            continue
        if run.audio_tokens:
            sounds.append(np.zeros(mel_frames(run.audio_tokens, family) * 160, dtype=np.float32))
            sources.append(len(videos))
        videos.append(picture)
    text = processor.tokenizer.apply_chat_template(
        conversation(runs),
        chat_template=processor.chat_template, tokenize=False,
    )  # fmt: skip
    output = processor(
        text=text, videos=videos or None, images=images or None, audio=sounds or None,
        audio_from_video_indices=sources if sounds and videos else None,
        load_audio_from_video=bool(videos and sounds), fps=fps, return_tensors="pt",
        videos_kwargs={"size": size, "cap_pixels_per_frame": False}, images_kwargs={"size": size},
    )  # fmt: skip
    return output["input_ids"][0].numpy()


@both_families
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # inside the stock processor
@pytest.mark.parametrize("fps", [2.0, 1.0, 0.3])
@pytest.mark.parametrize(
    "make",
    [
        lambda s: [],
        lambda s: [ImageRun((1, 4, 6))],
        lambda s: [VideoRun((3, 4, 4), s)],
        lambda s: [VideoRun((3, 4, 4), s, 75)],
        lambda s: [VideoRun((6, 4, 4), s, 150)],
        lambda s: [VideoRun((5, 4, 4), s, 180)],
        lambda s: [VideoRun((5, 4, 4), s, 20)],
        lambda s: [AudioRun(77)],
        lambda s: [VideoRun((2, 4, 4), s, 50), VideoRun((4, 2, 6), s, 90)],
        lambda s: [VideoRun((2, 4, 4), s, 50), VideoRun((4, 2, 6), s)],
        lambda s: [VideoRun((2, 4, 4), s, 50), AudioRun(30), ImageRun((1, 2, 2))],
        lambda s: [AudioRun(30), VideoRun((2, 4, 4), s, 50)],
    ],
)
def test_tokens_equal_the_stock_processors(make: Callable[[float], list[Run]], fps: float, family: str) -> None:
    runs = make(2 / fps)
    if any(getattr(run, "audio_tokens", 0) for run in runs) and not hasattr(stock_processor(), "load_audio_from_video"):
        pytest.skip("this version of transformers cannot say which sound belongs to which video")
    np.testing.assert_array_equal(sequence(runs, family).input_ids, stock_ids(runs, fps, family))


def test_map_of_a_video_with_sound() -> None:
    result = sequence([ImageRun((1, 2, 4)), VideoRun((3, 4, 4), 1.0, 60), AudioRun(5)])
    tokens = result.tokens
    placeholder = {
        rules().image_token_id: Modality.IMAGE,
        rules().video_token_id: Modality.VIDEO,
        rules().audio_token_id: Modality.AUDIO,
    }
    expected = [placeholder.get(token, Modality.TEXT) for token in result.input_ids.tolist()]
    assert tokens.modality.tolist() == expected
    video, audio = tokens.modality == Modality.VIDEO, tokens.modality == Modality.AUDIO
    assert tokens.item[video].tolist() == [1] * 12
    assert tokens.item[audio].tolist() == [2] * 60 + [3] * 5
    assert tokens.stream[video].tolist() == [1] * 12
    assert tokens.stream[audio].tolist() == [1] * 60 + [2] * 5
    assert tokens.frame[video].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert tokens.row[video].tolist() == [0, 0, 1, 1] * 3
    assert tokens.column[video].tolist() == [0, 1, 0, 1] * 3
    assert tokens.time[video].tolist() == [0] * 4 + [25] * 4 + [50] * 4
    assert tokens.time[audio].tolist() == [*range(60), *range(5)]
    text = tokens.modality == Modality.TEXT
    for name in ("item", "frame", "row", "column", "time", "stream"):
        assert (getattr(tokens, name)[text] == -1).all()
    layout = TokenLayout.stack([tokens])
    assert layout.segments("window", Modality.VIDEO).sizes.tolist() == [[8, 4, 0]]
    assert layout.segments("window", Modality.AUDIO).sizes.tolist() == [[50, 10, 5]]


@both_families
@settings(max_examples=40, deadline=None, derandomize=True)
@given(grid=GRIDS, seconds=SECONDS, audio=st.integers(0, 300))
def test_map_time_agrees_with_positions(family: str, grid: tuple[int, int, int], seconds: float, audio: int) -> None:
    result = sequence([VideoRun(grid, seconds, audio)], family)
    media = result.tokens.modality >= Modality.VIDEO
    temporal = result.position_ids[0][media]
    np.testing.assert_array_equal(result.tokens.time[media], np.floor(temporal - temporal[0] + 1e-3))


def test_qwen3_tokens_are_merged_one_by_one() -> None:
    result = sequence([VideoRun((3, 4, 4), 0.9, 30)], QWEN3)
    media = result.tokens.modality >= Modality.VIDEO
    # Grids at 0, 11.7 and 23.4 ids: sound of 12, 12 and 6 tokens behind them.
    video, audio = [Modality.VIDEO] * 4, Modality.AUDIO
    expected = [*video, *[audio] * 12, *video, *[audio] * 12, *video, *[audio] * 6]
    assert result.tokens.modality[media].tolist() == expected
    assert result.position_ids.dtype == np.float32
    start = result.position_ids[0][media][0]
    assert sorted(set((result.position_ids[0] - start)[result.tokens.modality == Modality.VIDEO])) == pytest.approx(
        [0, 11.7, 23.4], abs=1e-5
    )
    assert result.tokens.time[result.tokens.modality == Modality.VIDEO].tolist() == [0] * 4 + [11] * 4 + [23] * 4
    layout = TokenLayout.stack([result.tokens], ids_per_window=rules(QWEN3).ids_per_chunk)
    assert layout.segments("window", Modality.VIDEO).sizes.tolist() == [[12, 0]]
    assert layout.segments("window", Modality.AUDIO).sizes.tolist() == [[26, 4]]


@given(st.integers(0, 2000))
def test_qwen3_audio_tokens_equal_the_stock_count(mel: int) -> None:
    assert rules(QWEN3).audio_tokens(mel) == _get_feat_extract_output_lengths(mel)


def test_labels_hold_the_answers_of_all_turns() -> None:
    tokenizer = stock_processor().tokenizer
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What was it?"}], "family": "x"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "high"},
    ]
    ids, labels = chat().encode(messages)
    result = expand(ids, [VideoRun((2, 4, 4), 1.0, 50)], rules(), labels)
    supervised = result.labels != IGNORED
    np.testing.assert_array_equal(result.labels[supervised], result.input_ids[supervised])
    assert tokenizer.decode(result.labels[supervised]) == "red<|im_end|>high<|im_end|>"


def test_generation_prompt_is_a_prefix_of_the_training_sequence() -> None:
    question = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Who?"}]}
    prompt, prompt_labels = chat().encode([question], generation_prompt=True)
    whole, labels = chat().encode([question, {"role": "assistant", "content": "a circle"}])
    np.testing.assert_array_equal(whole[: len(prompt)], prompt)
    assert (prompt_labels == IGNORED).all()
    assert labels[len(prompt)] == whole[len(prompt)]
    assert (labels[: len(prompt)] == IGNORED).all()


def test_media_that_do_not_match_the_text_are_refused() -> None:
    ids, _ = chat().encode([{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(ValueError, match=r"placeholders for \['video'\].*media are \['audio'\]"):
        expand(ids, [AudioRun(3)], rules())
    with pytest.raises(ValueError, match="one placeholder per medium"):
        expand(ids, [], rules())


def test_template_that_rewrites_history_is_refused() -> None:
    template = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        ChatFormat(stock_processor().tokenizer, template).encode(messages)
