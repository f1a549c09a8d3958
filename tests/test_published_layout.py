"""Released folders go all the way: prepare, attach, generate, train, export, merge, evaluate; every answer ends."""

from __future__ import annotations

import json
import logging
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from jinja2 import Template
from tools import export
from transformers import AutoProcessor
from transformers.utils.logging import warning_once

from omnisieve import attach, build_compressor, load_backbone, load_compressor, load_processor, prepare, tuned_llm
from omnisieve.config import AudioSection, EvalConfig, MediaSection
from omnisieve.data.synthetic import manifest_text, write_clip
from omnisieve.evaluation.evaluate import evaluate
from tests.distributed.programs import train
from tests.models import FAMILIES, QWEN2_5
from tests.published_layout import (
    ANSWER,
    END_OF_TEXT,
    MESSAGE_END,
    RELEASES,
    GenerationConfig,
    chat_template,
    released_ranks,
    save_release,
)

LIMIT = 12
# The models read full clips, too; short ones keep the tests fast.
SHORT = MediaSection(max_frames=4, audio=AudioSection(max_seconds=2.0))
KINDS = get_args(GenerationConfig)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips with their first two questions, the answer to which is what the models here say."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "videos").mkdir()
    for index in range(2):
        write_clip(("a", "val", index, str(folder / "videos")))
    lines = [json.loads(line) for line in manifest_text("a", "val", 2).splitlines()]
    for line in lines:
        line["messages"] = line["messages"][:4]
        for answer in line["messages"][1::2]:
            answer["content"] = "bc"
    (folder / "val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "val.jsonl"


@pytest.fixture(scope="module")
def clip(manifest: Path) -> Path:
    return sorted((manifest.parent / "videos").iterdir())[0]


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of two steps with adapters, by the real program, on a release without a generation config."""
    folder = tmp_path_factory.mktemp("run")
    model = save_release(folder / "release", request.param, generation_config="absent")
    words = [
        "--config=recipes/omnisift_qwen2_5_omni_7b.yaml",
        f"model.path={model}",
        f"data.train={manifest}",
        "data.workers=0",
        "data.max_frames=4",
        "data.audio.max_seconds=2",
        "compressor.width=16",
        "compressor.heads=2",
        "train.llm.mode=lora",
        "train.llm.lora.targets=[q_proj,o_proj]",
        "train.gradient_accumulation_steps=1",
        "train.max_steps=2",
        f"output_dir={folder / 'run'}",
    ]
    status, output = train(*words)
    assert status == 0, output
    assert "tts_" not in output
    return folder / "run"


def family_of(run: Path) -> str:
    """The family of a run's model."""
    text = (run.parent / "release" / "config.json").read_text()
    return next(family for family in FAMILIES if RELEASES[family].architecture in text)


def answers(model: Any, prompt: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    """New tokens of each row up to the padding, in README's form."""
    written = model.generate(**prompt, max_new_tokens=LIMIT, do_sample=False, **options)
    rows = written[:, prompt["input_ids"].shape[1] :].tolist()
    return [[token for token in row if token != END_OF_TEXT] for row in rows]


@pytest.mark.parametrize("generation_config", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_ends(family: str, generation_config: GenerationConfig, clip: Path, tmp_path: Path) -> None:
    folder = save_release(tmp_path / "release", family, generation_config=generation_config)
    model, processor = load_backbone(folder, "auto"), load_processor(folder)
    one = prepare(model, processor, clip, "What is heard?", settings=SHORT)
    two = {name: value.repeat_interleave(2, dim=value.dim() - 2 if name == "position_ids" else 0)
           for name, value in one.items()}  # fmt: skip
    expected = [*ANSWER, MESSAGE_END]
    assert answers(model, one) == [expected]
    with attach(model, build_compressor("divprune_om", retained_ratio=0.25)) as attachment:
        assert answers(model, one) == [expected]
        assert attachment.last_plan.kept[0] < one["input_ids"].shape[1]
        assert answers(model, two) == [expected] * 2
        assert answers(model, one, num_beams=2) == [expected]


def test_loading_is_quiet_where_the_stock_call_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_release(tmp_path / "release")
    logger = logging.getLogger("transformers")  # its records go no further up
    logger.addHandler(caplog.handler)
    said = "tts_text_start_token_id"
    try:
        warning_once.cache_clear()
        load_backbone(folder, "auto")
        load_processor(folder)
        assert said not in caplog.text
        warning_once.cache_clear()
        AutoProcessor.from_pretrained(folder)
        assert said in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("eos_in_config", [False, True])
def test_a_thinker_saved_alone_ends_too(eos_in_config: bool, clip: Path, tmp_path: Path) -> None:
    folder = save_release(tmp_path / "release", eos_in_config=eos_in_config)
    load_backbone(folder, "auto").save_pretrained(tmp_path / "thinker")
    load_processor(folder).save_pretrained(tmp_path / "thinker")
    written = json.loads((tmp_path / "thinker" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [MESSAGE_END, END_OF_TEXT]
    model = load_backbone(tmp_path / "thinker", "auto")
    prompt = prepare(model, load_processor(tmp_path / "thinker"), clip, "What is heard?", settings=SHORT)
    assert answers(model, prompt) == [[*ANSWER, MESSAGE_END]]


@pytest.mark.parametrize("generation_config", KINDS)
def test_exports_merge_and_are_evaluated(
    run: Path, generation_config: GenerationConfig, clip: Path, manifest: Path, tmp_path: Path
) -> None:
    base = save_release(tmp_path / "release", family_of(run), generation_config=generation_config)
    processor = load_processor(base)
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    assert export.main([str(run), str(tmp_path / "merged"), "--merge", "--backbone", str(base)]) == 0
    model, merged = load_backbone(base, "auto"), load_backbone(tmp_path / "merged" / "model", "auto")
    prompt = prepare(model, processor, clip, "What is heard?", settings=SHORT)
    with tuned_llm(model, tmp_path / "out"), attach(model, load_compressor(tmp_path / "out")):
        assert answers(model, prompt) == [[*ANSWER, MESSAGE_END]]
    with attach(merged, load_compressor(tmp_path / "merged")):
        assert answers(merged, prompt) == [[*ANSWER, MESSAGE_END]]
    for path, methods in ((base, ["full", "random"]), (tmp_path / "merged" / "model", [f"{tmp_path}/merged/"])):
        config = EvalConfig(manifest=str(manifest), methods=methods, output_dir=str(tmp_path / "eval"))
        config.model.path, config.max_new_tokens, config.data.workers = str(path), LIMIT, 0
        config.data.max_frames, config.data.audio = SHORT.max_frames, SHORT.audio
        report, cells = evaluate(config)
        assert [row["accuracy"] for row in report["rows"]] == [100.0] * len(methods)
        assert {answer.predicted for cell in cells for answer in cell.answers} == {"bc"}


@pytest.mark.slow
def test_the_released_vocabulary_answers_too(clip: Path, tmp_path: Path) -> None:
    try:
        ranks = released_ranks()
    except PackageNotFoundError:
        pytest.skip("dashscope is not installed; see CONTRIBUTING.md: slow tests")
    folder = save_release(tmp_path / "release", ranks=ranks)
    model, processor = load_backbone(folder, "auto"), load_processor(folder)
    assert processor.tokenizer("Hello world, how are you?").input_ids == [9707, 1879, 11, 1246, 525, 498, 30]
    for text in ("How are you?", "你好世界 😀", "naïve café\n\n  42 x"):
        assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text
    prompt = prepare(model, processor, clip, "What is heard?", settings=SHORT)
    assert answers(model, prompt) == [[*ANSWER, MESSAGE_END]]


def test_the_chat_template_renders_as_released() -> None:
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Who?"}]}]
    text = Template(chat_template(RELEASES[QWEN2_5])).render(messages=chat, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_bos|><|VIDEO|><|vision_eos|>Who?<|im_end|>\n<|im_start|>assistant\n"
    )
