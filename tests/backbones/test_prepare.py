"""A media file and a question become inputs of the stock model; the snippet of README.md runs as printed."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from omnisieve import attach, build_compressor, load_backbone, prepare, save_compressor
from omnisieve.backbones import adapter_for
from omnisieve.config import MediaSection
from omnisieve.data.errors import DataError
from omnisieve.data.media import MediaError, MediaReader
from omnisieve.data.synthetic import manifest_text, write_clip
from tests.data.media_files import MediaSpec, write_media
from tests.data.stock import BACKBONE, save_qwen3

ROOT = Path(__file__).resolve().parents[2]
CONTENT = base64.b64encode(bytes(range(256)) * 3).decode()
PRINTED = "Qwen/Qwen2.5-Omni-7B"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    return (folder / write_clip(("a", "val", 0, str(folder)))).rename(folder / "clip.mp4")


def questions() -> list[tuple[str, str]]:
    """Of the clip, with their answers."""
    messages = json.loads(manifest_text("a", "val", 1).splitlines()[0])["messages"]
    texts = [m["content"] if isinstance(m["content"], str) else m["content"][-1]["text"] for m in messages]
    return [(texts[i].replace("<video>", "").strip(), texts[i + 1]) for i in range(0, 8, 2)]


def test_stock_generate_answers(clip: Path) -> None:
    model, processor = load_backbone(BACKBONE), AutoProcessor.from_pretrained(str(BACKBONE))
    right = 0
    for question, answer in questions():
        inputs = prepare(model, processor, clip, question)
        written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with attach(model, build_compressor("full")):
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), written)
        behind = written[0, inputs["input_ids"].shape[1] :]
        right += processor.decode(behind, skip_special_tokens=True).strip() == answer
    assert right >= 3


def test_settings_and_several_files_count(clip: Path, tmp_path: Path) -> None:
    folder = save_qwen3(tmp_path / "qwen3")
    model, processor = load_backbone(folder), AutoProcessor.from_pretrained(str(folder))
    one = prepare(model, processor, clip, "What?")
    two = prepare(model, processor, [clip, str(clip)], "What?", settings=MediaSection(fps=1.0))
    assert len(two["video_grid_thw"]) == 2
    assert two["video_grid_thw"][0, 0] * 2 == one["video_grid_thw"][0, 0]
    assert two["position_ids"].shape == (4, *two["input_ids"].shape)
    with attach(model, build_compressor("random", retained_ratio=0.25)) as attachment:
        model.generate(**two, max_new_tokens=1)
    assert attachment.last_plan.kept[0] < two["input_ids"].shape[1]


def test_a_message_of_the_system_comes_first(clip: Path) -> None:
    model, processor = load_backbone(BACKBONE), AutoProcessor.from_pretrained(str(BACKBONE))
    silent = prepare(model, processor, clip, "What?")["input_ids"][0]
    spoken = prepare(model, processor, clip, "What?", system="Be brief.")["input_ids"][0]
    message = [{"role": "system", "content": "Be brief."}]
    text = processor.tokenizer.apply_chat_template(message, chat_template=processor.chat_template, tokenize=False)
    before = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "Be brief." in text
    assert spoken.tolist() == [*before, *silent.tolist()]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("kind", ["video with sound", "video", "image", "audio", "text"])
def test_inputs_equal_those_of_the_stock_processor(kind: str, system: str | None, clip: Path, tmp_path: Path) -> None:
    """Called without any setting, so that sizes, rates and what a template puts in come from the model's own files."""
    model, processor = load_backbone(BACKBONE), AutoProcessor.from_pretrained(str(BACKBONE))
    modality = kind.split()[0]
    file, media, heard = stock_media(kind, clip, tmp_path)
    part = [] if file is None else [{"type": modality}]
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": [*part, {"type": "text", "text": "What?"}]})
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    stock = processor(text=text, return_tensors="pt", **media)
    ours = prepare(model, processor, [] if file is None else file, "What?", system=system)

    assert torch.equal(ours["input_ids"], stock["input_ids"])
    positions, _ = model.get_rope_index(
        stock["input_ids"], stock.get("image_grid_thw"), stock.get("video_grid_thw"), stock["attention_mask"],
        kind == "video with sound", stock["feature_attention_mask"].sum(1) if heard else None,
        stock.get("video_second_per_grid"),
    )  # fmt: skip
    assert torch.equal(ours["position_ids"][1:], positions)
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "video_second_per_grid"):
        assert (name in ours) == (name in stock)
        if name in ours:
            assert torch.equal(ours[name], stock[name])
    assert ("input_features" in ours) == heard
    if heard:
        mask = stock["feature_attention_mask"].bool()
        assert torch.equal(ours["input_features"], stock["input_features"][:, :, mask[0]])
    with torch.no_grad():
        options = {"use_audio_in_video": True} if kind == "video with sound" else {}
        torch.testing.assert_close(model(**ours).logits, model(**stock, **options).logits, rtol=0, atol=1e-4)


def stock_media(kind: str, clip: Path, folder: Path) -> tuple[Path | None, dict[str, Any], bool]:
    """A file, what the stock processor takes of it, and whether that is heard."""
    read = MediaReader().read(clip)
    assert read.audio is not None
    assert read.video is not None
    if kind == "video with sound":
        frames = torch.from_numpy(read.video.frames).permute(0, 3, 1, 2)
        sound = {"audio": [read.audio], "load_audio_from_video": True, "audio_from_video_indices": [0]}
        return clip, {"videos": [frames], **sound}, True
    if kind == "video":
        silent = write_media(folder / "silent.mp4", MediaSpec(audio_seconds=0.0))
        frames = MediaReader().read(silent).video.frames
        return silent, {"videos": [torch.from_numpy(frames).permute(0, 3, 1, 2)]}, False
    if kind == "image":
        picture = Image.fromarray(read.video.frames[0]).resize((150, 90))
        picture.save(folder / "picture.png")
        return folder / "picture.png", {"images": [picture]}, False
    if kind == "audio":
        path = write_media(folder / "a.wav", MediaSpec(seconds=0.0, audio_seconds=2.5, audio_codec="pcm_s16le"))
        return path, {"audio": [MediaReader().read(path, video=False).audio]}, True
    return None, {}, False


def test_a_file_that_cannot_be_read_is_named() -> None:
    model, processor = load_backbone(BACKBONE), AutoProcessor.from_pretrained(str(BACKBONE))
    with pytest.raises(MediaError, match=r"gone\.mp4.*there is no such file"):
        prepare(model, processor, "gone.mp4", "What?")


def test_kinds_are_told_by_content(clip: Path, tmp_path: Path) -> None:
    model, processor = load_backbone(BACKBONE), AutoProcessor.from_pretrained(str(BACKBONE))
    sound = write_media(
        tmp_path / "sound.webm", MediaSpec(0, audio_seconds=1, audio_codec="libopus", sample_rate=48_000)
    )
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.tif")
    config = adapter_for(model).token_rules()
    for path, token in ((clip, config.video_token_id), (sound, config.audio_token_id),
                        (tmp_path / "picture.tif", config.image_token_id)):  # fmt: skip
        renamed = tmp_path / "medium.dat"
        renamed.write_bytes(path.read_bytes())
        assert token in prepare(model, processor, str(renamed), "What?")["input_ids"][0].tolist()
    for text, told in (
        ("https://a.org/b.mp4", "is an address"),
        ("file:///b.mp4", "is a file URL"),
        (CONTENT, "base64"),
    ):
        with pytest.raises(DataError, match=told):
            prepare(model, processor, text, "What?")
    with pytest.raises(DataError, match=r"the text holds <\|VIDEO\|>"):
        prepare(model, processor, clip, "What is <|VIDEO|>?")


@pytest.mark.parametrize("page", ["README.md", "src/omnisieve/__init__.py"])
def test_the_snippet_runs_as_printed(
    page: str, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / page).read_text()
    if page.endswith(".md"):
        (source, *_) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    else:
        source = text.split('"""')[1].partition("\n\n")[2]
    for printed, here in ((PRINTED, str(BACKBONE)), (', "bfloat16", device="cuda"', ""), ("clip.mp4", str(clip))):
        assert printed in source
        source = source.replace(printed, here)
    save_compressor(build_compressor("omnisift", hidden_size=128, retained_ratio=0.5), tmp_path / "my_compressor")
    monkeypatch.chdir(tmp_path)
    exec(source, {})
    assert capsys.readouterr().out.strip()
