"""The shipped backbone: stock classes load it, its ids agree, it answers; its trainer's shortcuts change nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from omnisieve.backbones import adapter_for, load_backbone
from omnisieve.data.synthetic import draw_questions, make_clip
from omnisieve.data.synthetic.questions import answer_words

ROOT = Path(__file__).parents[2]
BACKBONE = ROOT / "data" / "testbed" / "backbone"
sys.path.insert(0, str(ROOT / "tools"))  # tools are programs, not a package

from testbed_backbone.features import encoder_inputs, tower_features  # noqa: E402
from testbed_backbone.language import answer_logits, kept_features, run_decoder  # noqa: E402
from testbed_backbone.packing import MEDIA, Packer, Record, make_record  # noqa: E402


@pytest.fixture(scope="module")
def processor() -> Qwen2_5OmniProcessor:
    return Qwen2_5OmniProcessor.from_pretrained(BACKBONE)


@pytest.fixture(scope="module")
def model() -> Qwen2_5OmniThinkerForConditionalGeneration:
    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(BACKBONE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    clip = make_clip("a", "val", 2)
    return encoder_inputs(clip, clip)


@pytest.fixture(scope="module")
def record(model: Qwen2_5OmniThinkerForConditionalGeneration, inputs: tuple[torch.Tensor, torch.Tensor]) -> Record:
    with torch.no_grad():
        video, audio = tower_features(model, *(x[None] for x in inputs))
    clip = make_clip("a", "val", 2)
    return make_record(clip, video[0], audio[0], draw_questions(clip))


def test_it_is_small_and_its_ids_agree_with_the_tokenizer(processor, model) -> None:
    assert (BACKBONE / "model.safetensors").stat().st_size < 8e6
    assert len(adapter_for(model).layers) >= 8
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    config, tokenizer = model.config, processor.tokenizer
    pairs = {
        config.audio_token_id: "<|AUDIO|>",
        config.image_token_id: "<|IMAGE|>",
        config.video_token_id: "<|VIDEO|>",
        config.audio_start_token_id: "<|audio_bos|>",
        config.audio_end_token_id: "<|audio_eos|>",
        config.vision_start_token_id: "<|vision_bos|>",
        config.vision_end_token_id: "<|vision_eos|>",
        config.user_token_id: "user",
        model.generation_config.eos_token_id: "<|im_end|>",
        model.generation_config.pad_token_id: "<|endoftext|>",
    }
    assert {i: tokenizer.convert_ids_to_tokens(i) for i in pairs} == pairs
    assert all(len(tokenizer.tokenize(text)) == 1 for word in answer_words() for text in (word, " " + word))


def test_it_answers_through_stock_generate(processor, model, inputs) -> None:
    patches, mel = inputs
    run = "".join("<|VIDEO|>" * 72 + "<|AUDIO|>" * (50 if w < 5 else 49) for w in range(6))
    right = 0
    questions = draw_questions(make_clip("a", "val", 2))[:8]
    for question in questions:
        content = [{"type": "video"}, {"type": "text", "text": question.text}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        text = text.replace("<|VIDEO|>", f"<|audio_bos|>{run}<|audio_eos|>")
        encoded = processor.tokenizer(text, return_tensors="pt")
        output = model.generate(
            **{name: encoded[name] for name in ("input_ids", "attention_mask")},
            input_features=mel[None].float(),
            feature_attention_mask=torch.ones(1, mel.shape[-1], dtype=torch.long),
            pixel_values_videos=patches.float(),
            video_grid_thw=torch.tensor([[12, 12, 12]]),
            video_second_per_grid=torch.tensor([1.0]),
            use_audio_in_video=True,
            max_new_tokens=4,
            do_sample=False,
        )[0, encoded["input_ids"].shape[1] :]
        assert output[-1] == model.generation_config.eos_token_id
        right += processor.tokenizer.decode(output, skip_special_tokens=True) == question.answer
    assert right >= len(questions) - 2


def test_batched_attention_equals_the_stock_towers(model, inputs) -> None:
    with torch.no_grad():
        stock, batched = (
            tower_features(m, *(torch.stack([x, x]) for x in inputs)) for m in (model, load_backbone(BACKBONE))
        )
    for one, other in zip(stock, batched, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_packed_questions_equal_one_question_per_forward(processor, model, record) -> None:
    packer = Packer(processor.tokenizer, model)
    keep = np.sort(np.random.default_rng(0).permutation(MEDIA)[:200])[None]

    def logits(questions: list) -> torch.Tensor:
        batch = packer.pack(keep, [questions])
        with torch.no_grad():
            return answer_logits(model, run_decoder(model, kept_features([record], batch), batch), batch)

    questions = record.questions[:4]
    torch.testing.assert_close(logits(questions), torch.cat([logits([q]) for q in questions]), atol=1e-4, rtol=1e-4)
