"""Finding a model's parts, encoding, merging, reading layouts and loading folders."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeForConditionalGeneration,
)
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import load_balancing_loss_func

from omnisieve.backbones import BackboneError, adapter_for, attach, load_backbone
from omnisieve.data.batch import Batch
from omnisieve.data.tokens import AudioRun, ImageRun, VideoRun, expand
from omnisieve.layout import Modality, TokenLayout
from tests.backbones.toys import norm_compressor, stock_embeds
from tests.models import AUDIO as AUDIO_ID
from tests.models import (
    DEEPSTACK_LAYERS,
    FAMILIES,
    HIDDEN,
    PATCH,
    PICTURE,
    QWEN3,
    QWEN3_PATCH,
    SILENT,
    SOUNDING,
    SPEECH,
    VISION_END,
    VISION_START,
    Media,
    family_of,
    media_tokens,
    tiny_config,
    tiny_inputs,
    tiny_thinker,
)
from tests.models import IMAGE as IMAGE_ID
from tests.models import VIDEO as VIDEO_ID

MIXED = [[PICTURE, SOUNDING, SPEECH], [SILENT, Media(grids=2, rows=2, columns=2)], [SPEECH], []]
# One grid every 2.6 s: the second window of 2 s has no grid. 33.8 and 67.6 ids of Qwen3 are no whole numbers.
SPARSE = Media(grids=3, rows=2, columns=2, mel=700, second_per_grid=2.6)
FIELDS = ("modality", "item", "frame", "row", "column", "time", "stream")


@pytest.fixture(scope="module", params=FAMILIES)
def thinker(request):
    return tiny_thinker(family=request.param)


def expected_map(items: list[Media], family: str, text: int = 6) -> np.ndarray:
    """Token map [7, S] written down from what the items are."""
    words = [(int(Modality.TEXT), -1, -1, -1, -1, -1, -1)]
    tokens = words * text
    number = 0
    ids_per_second = 13 if family == QWEN3 else 25
    for stream, item in enumerate(items):
        kind = Modality.IMAGE if item.image else Modality.VIDEO
        times = [int(grid * item.second_per_grid * ids_per_second) for grid in range(item.grids)]
        visual = [
            (int(kind), number, grid, r, c, time, stream)
            for grid, time in enumerate(times)
            for r in range(item.rows)
            for c in range(item.columns)
        ]
        count = item.qwen3_audio_tokens if family == QWEN3 else item.audio_tokens
        sound = [(int(Modality.AUDIO), number + bool(times), 0, 0, j, j, stream) for j in range(count)]
        if family == QWEN3:
            # By the time itself, of which the map has the whole part: a grid inside an id comes behind its sound.
            exact = [token[2] * item.second_per_grid * ids_per_second for token in visual] + list(range(count))
            order = sorted(range(len(exact)), key=lambda i: (round(exact[i], 4), (visual + sound)[i][0]))
            body = [(visual + sound)[i] for i in order]
        else:
            # Windows of 50 ids; video before audio inside a window.
            body = sorted(visual + sound, key=lambda token: (token[5] // 50, token[0]))
        number += bool(visual) + bool(sound)
        shell = len(media_tokens(item, family)) - len(body)
        tokens += words * (shell // 2) + body + words * (shell // 2) + words * text
    return np.array(tokens).T


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_layout_is_read_from_ids_and_positions(thinker, padding_side):
    samples = [*MIXED, [SPARSE, SOUNDING]]
    family = family_of(thinker)
    window = 26 if family == QWEN3 else 50
    inputs = tiny_inputs(thinker, samples, padding_side=padding_side)
    for rows in (3, 4):
        layout = adapter_for(thinker).layout(
            inputs["input_ids"], inputs["position_ids"][-rows:], inputs["attention_mask"]
        )
        for row, (items, mask) in enumerate(zip(samples, inputs["attention_mask"].bool().numpy(), strict=True)):
            found = np.stack([getattr(layout, name)[row, mask] for name in FIELDS])
            np.testing.assert_array_equal(found, expected_map(items, family))
            assert (layout.modality[row, ~mask] == Modality.PADDING).all()
            media = layout.time[row] >= 0
            clock = layout.stream[row, media] * 100 + layout.time[row, media] // window
            assert (np.unique(clock, return_inverse=True)[1] == _dense(layout.window[row, media])).all()


def _dense(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]


def test_layout_equals_the_one_of_the_data_side(thinker):
    adapter = adapter_for(thinker)
    rules = adapter.token_rules()
    words = [20, 21, 22]
    qwen3 = family_of(thinker) == QWEN3
    for items in [*MIXED, [SPARSE, SOUNDING]]:
        ids, runs = [*words], []
        for item in items:
            sound = item.qwen3_audio_tokens if qwen3 else item.audio_tokens
            grid = (item.grids, 2 * item.rows, 2 * item.columns)
            if item.image:
                runs.append(ImageRun(grid))
            elif item.grids:
                runs.append(VideoRun(grid, item.second_per_grid, sound))
            else:
                runs.append(AudioRun(sound))
            placeholder = IMAGE_ID if item.image else VIDEO_ID if item.grids else AUDIO_ID
            ids += [VISION_START, placeholder, VISION_END, *words]
        sequence = expand(np.array(ids), runs, rules)
        found = adapter.layout(
            torch.from_numpy(sequence.input_ids)[None], torch.from_numpy(sequence.position_ids)[:, None]
        )
        expected = TokenLayout.stack([sequence.tokens], ids_per_window=rules.ids_per_chunk)
        for name in (*FIELDS, "window"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def test_padding_in_the_middle_is_refused(thinker):
    inputs = tiny_inputs(thinker, [[SILENT]])
    inputs["attention_mask"][0, 3] = 0
    with pytest.raises(BackboneError, match="pad on one side"):
        adapter_for(thinker).layout(inputs["input_ids"], inputs["position_ids"], inputs["attention_mask"])


def test_encode_and_merge_equal_the_stock_forward(thinker):
    inputs = tiny_inputs(thinker, MIXED)
    adapter = adapter_for(thinker)
    layout = adapter.layout(inputs["input_ids"], inputs["position_ids"], inputs["attention_mask"])
    batch = Batch(layout=layout, labels=inputs["input_ids"], **inputs)
    features = adapter.encode(batch)
    assert not features.video.requires_grad
    assert len(features.video) == (inputs["input_ids"] == VIDEO_ID).sum()
    assert len(features.audio) == (inputs["input_ids"] == AUDIO_ID).sum()
    assert len(features.image) == (inputs["input_ids"] == IMAGE_ID).sum()
    merged = adapter.merge(inputs["input_ids"], features)
    assert torch.equal(merged, stock_embeds(thinker, inputs))
    # Whatever else the stock forward does with pixels.
    with torch.no_grad(), adapter.deepstack(features, layout):
        logits = thinker(
            inputs_embeds=merged, **{key: inputs[key] for key in ("attention_mask", "position_ids")}
        ).logits
        assert torch.equal(logits, thinker(**inputs).logits)


def test_embeddings_without_deepstack_are_refused():
    model = tiny_thinker(family=QWEN3)
    inputs = tiny_inputs(model, [[PICTURE, SOUNDING]])
    adapter = adapter_for(model)
    layout = adapter.layout(inputs["input_ids"], inputs["position_ids"])
    features = adapter.encode(Batch(layout=layout, labels=inputs["input_ids"], **inputs))
    merged = adapter.merge(inputs["input_ids"], features)
    with torch.no_grad(), attach(model, norm_compressor()) as attachment:
        attachment.expect(layout=layout)
        with pytest.raises(BackboneError, match=r"adapter\.deepstack"):
            model(inputs_embeds=merged, position_ids=inputs["position_ids"])
    with pytest.raises(BackboneError, match=r"hold no .*image/deepstack\.0"):
        adapter.deepstack(replace(features, extra={}), layout)


def test_router_logits_of_a_compressed_prompt():
    model = tiny_thinker(family=QWEN3)
    items = [SOUNDING, SPEECH]
    inputs = tiny_inputs(model, [[item] for item in items])
    mask = inputs["attention_mask"].clone()
    with torch.no_grad(), attach(model, norm_compressor()):
        output = model(**inputs, output_router_logits=True)
        alone = [model(**tiny_inputs(model, [[item]]), output_router_logits=True) for item in items]
    assert torch.equal(inputs["attention_mask"], mask)
    assert {len(logits) for logits in output.router_logits} == {output.logits.shape[:2].numel()}
    # The loss counts every kept token of every sample once, and no padding.
    logits = [torch.cat(layer) for layer in zip(*(single.router_logits for single in alone), strict=True)]
    assert len(logits[0]) < len(output.router_logits[0])
    expected = load_balancing_loss_func(tuple(logits), num_experts=4, top_k=2)
    assert torch.allclose(output.aux_loss, expected, atol=1e-6)


def test_parts(thinker):
    adapter = adapter_for(thinker)
    qwen3 = family_of(thinker) == QWEN3
    assert adapter.hidden_size == HIDDEN
    assert len(adapter.layers) == 3
    assert adapter.layers[0].self_attn.layer_idx == 0
    assert adapter.lm_head.out_features == thinker.config.get_text_config().vocab_size
    assert adapter.audio_tower.config.n_window == (50 if qwen3 else 100)
    assert adapter.visual.config.patch_size == (QWEN3_PATCH if qwen3 else PATCH)
    assert len(adapter.deepstack_layers) == (DEEPSTACK_LAYERS if qwen3 else 0)


@pytest.fixture(scope="module")
def whole(thinker):
    """The model with a talker configured but switched off."""
    torch.manual_seed(0)
    family = family_of(thinker)
    settings = {"thinker_config": tiny_config(family=family).to_dict(), "enable_audio_output": False}
    if family == QWEN3:
        return Qwen3OmniMoeForConditionalGeneration(Qwen3OmniMoeConfig(**settings)).eval()
    return Qwen2_5OmniForConditionalGeneration(Qwen2_5OmniConfig(**settings)).eval()


def test_the_whole_model_is_attached_through_its_thinker(whole):
    inputs = tiny_inputs(whole.thinker, [[SOUNDING]])
    assert adapter_for(whole).thinker is whole.thinker
    settings = {"max_new_tokens": 4, "do_sample": False}
    plain = whole.thinker.generate(**inputs, **settings)
    with attach(whole, norm_compressor(0.1)) as attachment:
        compressed = whole.thinker.generate(**inputs, **settings)
    assert attachment.last_plan.kept[0] < inputs["input_ids"].shape[1]
    assert compressed.shape == plain.shape
    assert torch.equal(whole.thinker.generate(**inputs, **settings), plain)


def test_speech_is_refused(whole, monkeypatch):
    inputs = tiny_inputs(whole.thinker, [[SOUNDING]])
    monkeypatch.setattr(whole, "has_talker", True)
    with attach(whole, norm_compressor()), pytest.raises(BackboneError, match="generation_mode='text'"):
        # What the whole model's `generate` asks of its thinker in order to speak.
        whole.thinker.generate(**inputs, max_new_tokens=4, output_hidden_states=True, return_dict_in_generate=True)
    with attach(whole, norm_compressor(1.0)), torch.no_grad():
        assert whole.thinker(**inputs, output_hidden_states=True).hidden_states is not None


def test_folders(thinker, whole, tmp_path):
    inputs = tiny_inputs(thinker, [[SOUNDING]])
    for model, name in ((thinker, "thinker"), (whole, "whole")):
        model.save_pretrained(tmp_path / name)
        loaded = load_backbone(tmp_path / name)
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        with torch.no_grad():
            expected = getattr(model, "thinker", model)(**inputs).logits
            assert torch.equal(loaded(**inputs).logits, expected)
    half = load_backbone(tmp_path / "thinker", dtype="bfloat16", attn_implementation="eager", device="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    decoder = adapter_for(half).decoder
    assert decoder.config._attn_implementation == "eager"
    assert decoder.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_wrapped(family):
    model = tiny_thinker(family=family)
    inputs = tiny_inputs(model, [[SOUNDING], [SPEECH]])
    with torch.no_grad(), attach(model, norm_compressor()):
        expected = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=r".*layers\.\d+\.self_attn\.(q_proj|v_proj)", task_type="CAUSAL_LM")
    )
    with attach(wrapped, norm_compressor()):
        logits = wrapped(**inputs).logits
        assert torch.allclose(logits, expected, atol=1e-6)
        logits.square().mean().backward()
        assert torch.equal(wrapped.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
    grads = [p.grad for n, p in wrapped.named_parameters() if "lora_B" in n]
    assert grads
    assert any(g is not None and g.abs().max() > 0 for g in grads)
