"""What cannot be compressed is refused, and the message says how to cure it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig, Qwen2_5OmniThinkerForConditionalGeneration, StaticCache

from omnisieve.backbones import BackboneError, Estimator, adapter_for, attach, load_backbone
from omnisieve.compressors.base import Settings
from tests.backbones.toys import NeedyCompressor, learned_toy, norm_compressor, stock_embeds
from tests.data.stock import BACKBONE
from tests.models import HIDDEN, SOUNDING, SPEECH, tiny_inputs, tiny_thinker


@pytest.fixture(scope="module")
def thinker():
    return tiny_thinker()


@pytest.fixture
def inputs(thinker):
    return tiny_inputs(thinker, [[SOUNDING]])


def generate(model, inputs, **changes):
    return model.generate(**inputs, max_new_tokens=4, do_sample=False, **changes)


def test_another_model():
    with pytest.raises(BackboneError, match=r"Linear is not supported; supported are Qwen2_5Omni"):
        adapter_for(nn.Linear(2, 2))


def test_attaching_twice(thinker, inputs):
    with (
        attach(thinker, norm_compressor()),
        pytest.raises(BackboneError, match="already"),
        attach(thinker, norm_compressor()),
    ):
        pass
    with attach(thinker, norm_compressor()) as attachment:
        generate(thinker, inputs)
    assert attachment.last_plan is not None


def test_a_compressor_of_another_width(thinker):
    with pytest.raises(BackboneError, match="hidden size 64, the model has 32"), attach(thinker, learned_toy(64)):
        pass


def test_embeddings_without_positions(thinker, inputs):
    with torch.no_grad(), attach(thinker, norm_compressor()) as attachment:
        thinker(**inputs)
        layout, embeds = attachment.last_layout, torch.zeros(*inputs["input_ids"].shape, HIDDEN)
        attachment.expect(layout=layout)
        with pytest.raises(BackboneError, match="give position_ids"):
            thinker(inputs_embeds=embeds)


def test_a_compressor_on_another_device(thinker):
    compressor = learned_toy(HIDDEN).to("meta")
    with pytest.raises(BackboneError, match="is on meta, the model on cpu"), attach(thinker, compressor):
        pass


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_static_caches(thinker, inputs, ratio):
    with attach(thinker, norm_compressor(ratio)):
        with pytest.raises(BackboneError, match="dynamic cache"):
            generate(thinker, tiny_inputs(thinker, [[SOUNDING], [SPEECH]]), cache_implementation="static")
        if ratio < 1:
            with pytest.raises(BackboneError, match="dynamic cache"), torch.no_grad():
                thinker(**inputs, past_key_values=StaticCache(thinker.config.get_text_config(), max_cache_len=200))


def test_prepared_masks(thinker, inputs):
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with attach(thinker, norm_compressor()), pytest.raises(BackboneError, match="prepared attention mask"):
        thinker(**inputs)


def test_a_prompt_in_chunks(thinker, inputs):
    half = inputs["input_ids"].shape[1] // 2
    adapter = adapter_for(thinker)
    embeds = stock_embeds(thinker, inputs)
    cache = DynamicCache()
    with torch.no_grad(), attach(thinker, norm_compressor()) as attachment:
        attachment.layout = adapter.layout(inputs["input_ids"][:, :half], inputs["position_ids"][..., :half])
        thinker(inputs_embeds=embeds[:, :half], position_ids=inputs["position_ids"][..., :half], past_key_values=cache)
        with pytest.raises(BackboneError, match="prefill_chunk_size"):
            thinker(
                inputs_embeds=embeds[:, half:], position_ids=inputs["position_ids"][..., half:], past_key_values=cache
            )


def test_media_after_a_text_only_prefill(thinker, inputs):
    cache = DynamicCache()
    words = torch.full((1, 3), 20)
    positions = torch.arange(6).expand(3, 1, 6)
    with torch.no_grad(), attach(thinker, norm_compressor()):
        thinker(input_ids=words, position_ids=positions[..., :3], past_key_values=cache)
        # More text is fine.
        thinker(input_ids=words, position_ids=positions[..., 3:], past_key_values=cache)
        with pytest.raises(BackboneError, match="filled cache"):
            thinker(**inputs, past_key_values=cache)


def test_assisted_decoding(thinker, inputs):
    with attach(thinker, norm_compressor()), pytest.raises(BackboneError, match="assisted decoding"):
        generate(thinker, inputs, prompt_lookup_num_tokens=2)


def test_embeddings_without_layout(thinker, inputs):
    embeds = stock_embeds(thinker, inputs)
    with attach(thinker, norm_compressor()) as attachment:
        with pytest.raises(BackboneError, match="layout"):
            thinker(inputs_embeds=embeds, position_ids=inputs["position_ids"])
        attachment.layout = adapter_for(thinker).layout(inputs["input_ids"], inputs["position_ids"])
        thinker(inputs_embeds=embeds, position_ids=inputs["position_ids"])
        # A layout is used up: the next batch may be another one.
        assert attachment.layout is None


def test_a_layout_of_another_batch(thinker, inputs):
    other = tiny_inputs(thinker, [[SPEECH]])
    with attach(thinker, norm_compressor()) as attachment:
        attachment.layout = adapter_for(thinker).layout(other["input_ids"], other["position_ids"])
        with pytest.raises(BackboneError, match=r"layout is for \[1, 91\] tokens, the forward has \[1, 140\]"):
            thinker(**inputs)


def test_media_without_positions(thinker, inputs):
    for name in ("position_ids", "attention_mask"):
        inputs.pop(name)
    with attach(thinker, norm_compressor()), pytest.raises(BackboneError, match="pass attention_mask"):
        thinker(**inputs)


def test_needs_of_cached_features(thinker, inputs):
    embeds = stock_embeds(thinker, inputs)
    with attach(thinker, NeedyCompressor(Settings(retained_ratio=0.3))) as attachment:
        attachment.layout = adapter_for(thinker).layout(inputs["input_ids"], inputs["position_ids"])
        with pytest.raises(BackboneError, match=r"attention_received of audio tokens.* `attachment.expect\(needs"):
            thinker(inputs_embeds=embeds, position_ids=inputs["position_ids"])


def test_masked_route_with_a_cache(thinker, inputs):
    with attach(thinker, learned_toy(HIDDEN), Estimator("masked")), pytest.raises(BackboneError, match="for training"):
        thinker(**inputs, past_key_values=DynamicCache())


@pytest.mark.parametrize("settings", [{"route": "soft"}, {"candidates": 0.0}, {"candidates": 1.5}])
def test_estimator_settings(settings):
    with pytest.raises(BackboneError, match="estimator"):
        Estimator(**settings)


@pytest.mark.parametrize("path", ["./absent", "../absent", "{here}/absent", "data/testbed/absent", "data/absent"])
def test_a_misspelt_folder_is_not_looked_for_elsewhere(path, tmp_path, monkeypatch):
    (tmp_path / "data" / "testbed").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PretrainedConfig, "get_config_dict", lambda name: pytest.fail(f"asked the hub for {name}"))
    with pytest.raises(BackboneError, match=r"absent is no folder that exists; give"):
        load_backbone(path.format(here=tmp_path))


@pytest.mark.parametrize("name", ["Owner/Model-7B", "model"])
def test_a_name_on_the_hub_is_looked_for(name, tmp_path, monkeypatch):
    def ask(name: str):
        raise OSError(f"no {name} there")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PretrainedConfig, "get_config_dict", ask)
    with pytest.raises(BackboneError, match=f"that the hub, or its local cache, has: no {name} there"):
        load_backbone(name)


FLASH = "flash_attention_2"


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ({"attn_implementation": FLASH}, f"attn_implementation '{FLASH}'"),
        ({"encoder_attn_implementation": FLASH}, f"encoder_attn_implementation '{FLASH}'"),
        (
            {"attn_implementation": FLASH, "encoder_attn_implementation": FLASH},
            f"attn_implementation '{FLASH}' and encoder_attn_implementation '{FLASH}'",
        ),
    ],
)
def test_attention_without_its_package(chosen, named, monkeypatch):
    def refuse(*_, **__):
        raise ImportError("the package for FlashAttention2 doesn't seem to be installed.")

    monkeypatch.setattr(Qwen2_5OmniThinkerForConditionalGeneration, "from_pretrained", refuse)
    with pytest.raises(BackboneError, match=rf"^{named} cannot be used: .*installed\. Install it, or choose"):
        load_backbone(BACKBONE, "bfloat16", **chosen)


def test_folder_without_model(tmp_path):
    with pytest.raises(BackboneError, match=r"has no config\.json; give the folder"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BackboneError, match="is a 'llama'"):
        load_backbone(tmp_path)
    with pytest.raises(BackboneError, match="choose 'float32', 'bfloat16' or 'auto'"):
        load_backbone(tmp_path, dtype="float16")
