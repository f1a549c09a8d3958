"""Whatever is raised on one sample becomes that sample's error, with type and text."""

from __future__ import annotations

import errno
import pickle
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omnisieve.data.batch import BadSample
from omnisieve.data.dataset import MediaLoader, OmniDataset
from omnisieve.data.errors import DataError, SampleError, foreign_errors, shortened
from omnisieve.data.length_limit import TooLongError
from omnisieve.data.manifest import Conversation, MediaPart
from omnisieve.data.media import MediaError
from omnisieve.data.preprocess import Preprocessor
from tests.data.stock import rules, stock_processor

FOREIGN = [
    ValueError("bad ratio"), RuntimeError("codec"), KeyError("tRNS"), IndexError("range"), struct.error("unpack"),
    zlib.error("inflate"), AttributeError("no decoder"), MemoryError(), RecursionError("too deep"),
    AssertionError("odd"), ZeroDivisionError("rate"), SyntaxError("broken PNG"), EOFError("end"), OverflowError("size"),
    OSError(errno.ESTALE, "Stale file handle", "/a/very/long/path"), UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no"),
    type("BackendError", (Exception,), {})("of a library"),
]  # fmt: skip


@pytest.fixture
def loader() -> MediaLoader:
    return MediaLoader(Preprocessor(stock_processor(), rules(), min_pixels=56 * 56, max_pixels=56 * 56))


@pytest.mark.parametrize("error", FOREIGN, ids=lambda error: type(error).__name__)
def test_every_exception_is_caught_with_type_and_text(error: Exception) -> None:
    with pytest.raises(MediaError) as caught, foreign_errors(partial(MediaError, "a.mp4", "video", "unusable")):
        raise error
    assert caught.value.reason.startswith(type(error).__name__)
    text = error.strerror if isinstance(error, OSError) else str(error)
    assert str(text) in caught.value.reason
    assert "/a/very/long/path" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [DataError("the run's"), MediaError("b", "video", "empty", "0 bytes"),
                                   KeyboardInterrupt(), SystemExit(1)])  # fmt: skip
def test_errors_of_ours_and_requests_to_end_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, foreign_errors(partial(MediaError, "a", "video", "unusable")):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [SampleError("a", "text", "b", "c"), MediaError("a", "video", "empty", "0 bytes"),
                                   TooLongError("a", "9 tokens", "cut it")])  # fmt: skip
def test_errors_travel_between_processes(error: SampleError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))


def test_messages_stay_short() -> None:
    with (
        pytest.raises(SampleError) as caught,
        foreign_errors(lambda text: SampleError("f" * 5000, "text", text, "none")),
    ):
        raise ValueError("x\n" * 5000)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)
    assert "(5000 characters)" in str(caught.value)
    assert shortened("as it is") == "as it is"


def test_faults_of_a_file_are_listed_by_file_and_those_of_a_sample_by_both() -> None:
    def key(kind: str, id: str) -> tuple[str, ...]:
        return BadSample(id, "a.mp4", kind, "", "", "2").key

    assert key("unusable", "1") == key("unusable", "3")
    for kind in ("text", "too_long", "unreachable"):
        assert key(kind, "1") != key(kind, "3")


def conversation(id: str, *media: MediaPart, text: str = "What?") -> Conversation:
    content = [*({"type": part.kind} for part in media), {"type": "text", "text": text}]
    return Conversation(id, ({"role": "user", "content": content}, {"role": "assistant", "content": "red"}), media)


@pytest.mark.parametrize("error", FOREIGN, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["image_processor", "tokenizer"])
def test_a_sample_on_which_a_library_fails_is_replaced(
    tmp_path: Path, loader: MediaLoader, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    lines = [conversation("bad", MediaPart("image", tmp_path / "a.png")), conversation("good", text="Why?")]

    def fail_on_the_first(*args: Any, **options: Any) -> Any:
        if where == "image_processor" or "What" in str(args):
            raise error
        return stock_processor().tokenizer(*args, **options)

    owner = loader.preprocessor if where == "image_processor" else loader.preprocessor.chat
    if where == "tokenizer":
        fail_on_the_first.apply_chat_template = stock_processor().tokenizer.apply_chat_template  # type: ignore[attr-defined]
        fail_on_the_first.eos_token_id = stock_processor().tokenizer.eos_token_id  # type: ignore[attr-defined]
    monkeypatch.setattr(owner, where, fail_on_the_first)
    (failure,) = {OmniDataset(lines, loader, on_error="replace")[index].failures[:1] for index in (0, 0)}
    assert (failure[0].id, failure[0].path, failure[0].replacement) == ("bad", str(tmp_path / "a.png"), "good")
    assert failure[0].kind == ("unusable" if where == "image_processor" else "text")
    assert type(error).__name__ in failure[0].reason
    with pytest.raises(SampleError):
        OmniDataset(lines, loader)[0]


@pytest.mark.parametrize("size", [(3000, 4), (4, 3000)])
def test_an_aspect_ratio_above_200_is_the_error_of_its_file(
    tmp_path: Path, loader: MediaLoader, size: tuple[int, int]
) -> None:
    Image.new("RGB", size).save(tmp_path / "thin.png")
    for look in (loader.load_part, loader.glance):
        with pytest.raises(MediaError, match=r"thin\.png: image: ValueError: absolute aspect ratio must be") as caught:
            look(MediaPart("image", tmp_path / "thin.png"))
        assert caught.value.kind == "unusable"


MARKS = ["<|VIDEO|>", "<|AUDIO|>", "<|IMAGE|>", "<|vision_bos|>", "<|vision_eos|>", "<|audio_bos|>", "<|audio_eos|>",
         "<|video_pad|>", "<|audio_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|audio_start|>",
         "<|audio_end|>", "<|vision_pad|>", "<|im_start|>", "<|im_end|>"]  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_in_a_text_is_the_error_of_its_sample(loader: MediaLoader, mark: str) -> None:
    whole = conversation("7", text=f"What is {mark}?")
    answer = {"role": "assistant", "content": f"{mark}"}
    for line in (whole, Conversation("7", ({"role": "user", "content": "Why?"}, answer), ())):
        assert line.mark() == mark
        with pytest.raises(SampleError, match="conversation 7: the text holds") as caught:
            loader.sample(line, [])
        assert mark in caught.value.reason
        assert caught.value.kind == "text"


@pytest.mark.parametrize("text", ["<video>", "VIDEO", "<|Video|>", "<|box_start|>", "a | b |> c", "<|endoftext"])
def test_other_texts_hold_no_mark(text: str) -> None:
    assert conversation("1", text=text).mark() is None


def test_marks_are_those_of_the_processor() -> None:
    processor = stock_processor()
    names = ("image", "video", "audio", "vision_bos", "vision_eos", "audio_bos", "audio_eos")
    used = [getattr(processor, f"{name}_token") for name in names]
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "audio"}, {"type": "image"}]}], tokenize=False
    )
    used += [mark for mark in processor.tokenizer.all_special_tokens if mark in rendered]
    assert len(used) >= len(names) + 3
    assert set(used) <= set(MARKS)


def test_arrays_of_any_content_are_read(loader: MediaLoader) -> None:
    for shape in ((1, 1, 3), (1, 150, 3)):
        assert loader.preprocessor.image(np.zeros(shape, np.uint8)).grid[0] == 1
