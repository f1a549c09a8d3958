from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from omnisieve.data.batch import Batch, Sample
from omnisieve.data.collate import collate
from omnisieve.data.dataset import MediaLoader, OmniDataset
from omnisieve.data.errors import DataError
from omnisieve.data.manifest import Manifest, MediaPart
from omnisieve.data.media import MediaError
from omnisieve.data.preprocess import Preprocessor
from omnisieve.data.sampler import StreamSampler
from omnisieve.data.tokens import IGNORED
from omnisieve.layout import Modality
from tests.data.stock import rules, stock_positions, stock_processor

Media = Callable[..., Path]
PIXELS = {"min_pixels": 56 * 56, "max_pixels": 56 * 112}


def turns(*content: dict[str, Any], question: str = "What was it?") -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [*content, {"type": "text", "text": question}], "family": "first"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "And then?", "family": "second"},
        {"role": "assistant", "content": "blue"},
    ]


@pytest.fixture(scope="module")
def conversations(media: Media, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """With sound, silent, sound only, two videos, text only, an image, a video and a separate sound."""
    sounding, silent = media("clip.mp4"), media("silent.mp4", audio_seconds=0)
    short = media("sound6.mp4", audio_seconds=6.0)
    sound = media("sound.wav", seconds=0.0, audio_seconds=2.0, audio_codec="pcm_s16le", sample_rate=44_100, channels=2)
    folder = tmp_path_factory.mktemp("manifest")
    Image.fromarray(np.full((56, 84, 3), 90, np.uint8)).save(folder / "picture.png")

    def video(path: Path, **keys: int) -> dict[str, Any]:
        return {"type": "video", "video": str(path), **keys}

    lines = {
        "sounding": turns(video(sounding)),
        "silent": turns(video(silent)),
        "sound": turns({"type": "audio", "audio": str(sound)}),
        "two": turns(video(sounding), video(short, max_frames=4)),
        "text": turns(),
        "image": turns({"type": "image", "image": "picture.png"}),
        "separate": turns(video(silent), {"type": "audio", "audio": str(sound)}),
        "both": turns(video(sounding), {"type": "audio", "audio": str(sound)}),
    }
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps({"id": key, "messages": m, "level": 1}) + "\n" for key, m in lines.items()))
    return Manifest(path)


@pytest.fixture(scope="module")
def loader() -> MediaLoader:
    return MediaLoader(Preprocessor(stock_processor(), rules(), **PIXELS), decode_seconds=30)


@pytest.fixture(scope="module")
def samples(conversations: Manifest, loader: MediaLoader) -> dict[str, Sample]:
    return {sample.id: sample for sample in OmniDataset(conversations, loader)}


def make_batch(samples: list[Sample], **options: Any) -> Batch:
    return collate(samples, pad_token_id=stock_processor().tokenizer.pad_token_id, **options)


def count(sample: Sample, modality: Modality) -> int:
    return int((sample.tokens.modality == modality).sum())


def test_media_of_each_sample(samples: dict[str, Sample]) -> None:
    counts = {
        name: tuple(count(sample, m) for m in (Modality.IMAGE, Modality.VIDEO, Modality.AUDIO))
        for name, sample in samples.items()
    }
    assert counts == {
        "sounding": (0, 4 * 8, 100),
        "silent": (0, 4 * 8, 0),
        "sound": (0, 0, 50),
        "two": (0, 4 * 8 + 2 * 8, 100 + 150),
        "text": (0, 0, 0),
        "image": (6, 0, 0),
        "separate": (0, 4 * 8, 50),
        "both": (0, 4 * 8, 100 + 50),
    }
    assert samples["two"].seconds_per_grid == (1.0, pytest.approx(2.0))
    assert samples["two"].video_grids == ((4, 4, 8), (2, 4, 8))
    assert [mel.shape[1] for mel in samples["both"].audios] == [400, 200]
    assert samples["text"].meta == {"level": 1}


def test_positions_of_decoded_samples_equal_the_stock_rule(samples: dict[str, Sample]) -> None:
    for name, sample in samples.items():
        if name == "both":  # the stock rule's flag is for the whole batch, so it cannot say this
            continue
        expected = stock_positions(
            sample.input_ids,
            list(sample.video_grids),
            list(sample.image_grids),
            list(sample.seconds_per_grid),
            [mel.shape[1] for mel in sample.audios],
            sound_in_video=name in ("sounding", "two"),
        )
        assert torch.equal(sample.position_ids, expected), name


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_mixed_batch_holds_each_sample_unchanged(samples: dict[str, Sample], side: Any) -> None:
    chosen = list(samples.values())
    batch = make_batch(chosen, padding_side=side, pad_to_multiple_of=8)
    assert len(batch) == 8
    assert batch.input_ids.shape[1] % 8 == 0
    for row, sample in enumerate(chosen):
        size = len(sample.input_ids)
        place = slice(0, size) if side == "right" else slice(batch.input_ids.shape[1] - size, None)
        assert torch.equal(batch.input_ids[row, place], sample.input_ids)
        assert torch.equal(batch.labels[row, place], sample.labels)
        assert torch.equal(batch.position_ids[:, row, place], sample.position_ids)
        assert batch.attention_mask[row, place].all()
        assert int(batch.attention_mask[row].sum()) == size
        assert int((batch.labels[row] != IGNORED).sum()) == batch.answer_tokens[row]
        np.testing.assert_array_equal(batch.layout.modality[row, place], sample.tokens.modality)
        assert (batch.layout.modality[row] != Modality.PADDING).sum() == size
    assert batch.ids == batch.layout.names == tuple(samples)
    assert batch.video_grid_thw is not None
    assert batch.video_grid_thw.tolist() == [list(grid) for s in chosen for grid in s.video_grids]
    assert batch.pixel_values_videos is not None
    assert len(batch.pixel_values_videos) == batch.video_grid_thw.prod(dim=1).sum()
    assert batch.feature_attention_mask is not None
    assert batch.feature_attention_mask.sum(dim=1).tolist() == [400, 200, 400, 600, 200, 400, 200]
    assert batch.input_features is not None
    assert (batch.input_features * (1 - batch.feature_attention_mask[:, None])).abs().max() == 0
    assert batch.image_grid_thw is not None
    assert batch.image_grid_thw.tolist() == [[1, 4, 6]]


def test_a_batch_of_text_has_no_media(samples: dict[str, Sample]) -> None:
    batch = make_batch([samples["text"], samples["text"]])
    assert set(batch.model_inputs()) == {"input_ids", "attention_mask", "position_ids"}
    with pytest.raises(ValueError, match="empty batch"):
        make_batch([])


def test_moving_a_batch_moves_everything(samples: dict[str, Sample]) -> None:
    batch = make_batch([samples["both"], samples["image"]]).to("meta")
    assert all(tensor.device.type == "meta" for tensor in batch.model_inputs().values())
    assert batch.layout.device.type == "meta"


def test_a_question_alone_ends_with_the_generation_prompt(conversations: Manifest, loader: MediaLoader) -> None:
    first, second = (
        loader.sample(question, loader.load(question), generation_prompt=True)
        for question in conversations[0].questions()
    )
    tokenizer = stock_processor().tokenizer
    assert (first.meta["family"], first.meta["answer"]) == ("first", "red")
    assert (second.meta["family"], second.meta["answer"]) == ("second", "blue")
    assert tokenizer.decode(second.input_ids[-20:]).endswith("And then?<|im_end|>\n<|im_start|>assistant\n")
    assert (second.labels == IGNORED).all()
    assert count(second, Modality.VIDEO) == count(first, Modality.VIDEO) == 32


def test_answers_of_all_turns_are_supervised(samples: dict[str, Sample]) -> None:
    for sample in samples.values():
        answers = stock_processor().tokenizer.decode(sample.labels[sample.labels != IGNORED])
        assert answers == "red<|im_end|>blue<|im_end|>"


def test_turns_without_loss_and_system_messages(tmp_path: Path, loader: MediaLoader) -> None:
    messages = turns()
    messages[1]["loss"] = False
    told = [{"role": "system", "content": "Be brief."}, *turns()]
    lines = [{"messages": messages}, {"messages": turns(), "system": "Be brief."}, {"messages": told}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one, by_key, by_message = OmniDataset(Manifest(tmp_path / "m.jsonl"), loader)
    tokenizer = stock_processor().tokenizer
    assert tokenizer.decode(one.labels[one.labels != IGNORED]) == "blue<|im_end|>"
    assert "assistant\nred<|im_end|>" in tokenizer.decode(one.input_ids)
    assert "system\nBe brief.<|im_end|>" in tokenizer.decode(by_key.input_ids)
    assert torch.equal(by_key.input_ids, by_message.input_ids)
    assert torch.equal(by_key.labels, by_message.labels)


def test_bad_files_are_replaced_by_a_function_of_the_index(
    tmp_path: Path, conversations: Manifest, loader: MediaLoader
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"")
    line = {"id": "bad", "messages": turns({"type": "video", "video": "broken.mp4"})}
    (tmp_path / "m.jsonl").write_text(json.dumps(line) + "\n")
    mixed = [*Manifest(tmp_path / "m.jsonl"), *conversations]
    with pytest.raises(MediaError, match=r"broken\.mp4"):
        OmniDataset(mixed, loader)[0]
    dataset = OmniDataset(mixed, loader, on_error="replace")
    one, again = dataset[0], dataset[0]
    assert one.id == again.id != "bad"
    assert len(one.failures) >= 1
    bad = one.failures[0]
    assert (bad.id, bad.path, bad.kind, bad.replacement) == ("bad", str(tmp_path / "broken.mp4"), "empty", one.id)
    assert dataset[2].failures == ()
    assert make_batch([one, dataset[1]]).failures == one.failures
    with pytest.raises(DataError, match=r"cannot be used; first: .*broken\.mp4"):
        OmniDataset(mixed[:1], loader, on_error="replace")[0]


def test_sound_files_without_sound_are_refused(media: Media, tmp_path: Path, loader: MediaLoader) -> None:
    path = media("silent.mp4", audio_seconds=0)
    line = {"messages": turns({"type": "audio", "audio": str(path)})}
    (tmp_path / "m.jsonl").write_text(json.dumps(line))
    with pytest.raises(MediaError, match="there is no sound"):
        OmniDataset(Manifest(tmp_path / "m.jsonl"), loader)[0]


class Collate:
    def __call__(self, samples: list[Sample]) -> Batch:
        return make_batch(samples)


def test_workers_give_the_same_batches(conversations: Manifest, loader: MediaLoader) -> None:
    dataset = OmniDataset(conversations, loader)

    def batches(workers: int) -> list[Batch]:
        sampler = StreamSampler(len(dataset), 3, seed=1)
        iterator = iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=Collate(), num_workers=workers))
        return [next(iterator) for _ in range(3)]

    for alone, parallel in zip(batches(0), batches(2), strict=True):
        assert alone.ids == parallel.ids
        assert torch.equal(alone.position_ids, parallel.position_ids)
        for name, tensor in alone.model_inputs().items():
            assert torch.equal(tensor, parallel.model_inputs()[name]), name


def test_sizes_are_known_without_decoding(conversations: Manifest, media: Media, loader: MediaLoader) -> None:
    parts = {part for line in conversations for part in line.media if part.kind != "image"}
    names = {"late.mp4": {"audio_start": 1.5, "audio_seconds": 2.0}, "clip.webm": {"video_codec": "libvpx-vp9",
             "audio_codec": "libopus", "sample_rate": 48_000}, "clip.ts": {}, "short.mp4": {"seconds": 0.3},
             "clip.mkv": {}}  # fmt: skip
    if hasattr(av.VideoStream, "set_display_rotation"):  # PyAV below 18 cannot write it
        names["rotated.mp4"] = {"rotation": 90}
    parts |= {MediaPart("video", media(name, **spec)) for name, spec in names.items()}
    for part in parts:
        probed, decoded = loader.size(loader.probe(part)), loader.load_part(part).run
        sound = "tokens" if part.kind == "audio" else "audio_tokens"
        assert getattr(probed, sound) == pytest.approx(getattr(decoded, sound), abs=2), part
        assert replace(probed, **{sound: 0}) == replace(decoded, **{sound: 0}), part
