"""Encoder statistics equal the weights of an eager run."""

from __future__ import annotations

import pytest
import torch

from omnisieve.backbones import BackboneError, adapter_for, attach, feature_name
from omnisieve.backbones.saliency import attention_received
from omnisieve.compressors.base import Need, Settings
from omnisieve.data.batch import Batch
from omnisieve.layout import Modality
from tests.backbones.toys import AUDIO_NEED, NeedyCompressor, stock_embeds
from tests.models import SILENT, SOUNDING, SPEECH, Media, tiny_inputs, tiny_thinker

GLOBAL_NEED = Need("attention_received", Modality.AUDIO, "global")
SAMPLES = [[SOUNDING], [SILENT], [SPEECH, Media(grids=0, mel=207)]]


@pytest.fixture(scope="module")
def thinker():
    return tiny_thinker()


def batch_of(model, inputs):
    layout = adapter_for(model).layout(inputs["input_ids"], inputs["position_ids"], inputs["attention_mask"])
    return Batch(layout=layout, labels=inputs["input_ids"], **inputs)


def eager_weights(model, inputs):
    """Weights of the last layer of an eager run, one [H, L, L] per 2-s block, and the blocks of every item."""
    weights = []
    tower = adapter_for(model).audio_tower
    original = torch.nn.functional.softmax

    def look(logits, *args, **kwargs):
        out = original(logits, *args, **kwargs)
        weights.append(out[0])
        return out

    config = tower.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    torch.nn.functional.softmax = look
    try:
        model.get_audio_features(inputs["input_features"], inputs["feature_attention_mask"])
    finally:
        torch.nn.functional.softmax = original
        config._attn_implementation = before
    blocks = [-(-int(n) // 200) for n in inputs["feature_attention_mask"].sum(1)]
    return weights[-sum(blocks) :], blocks


def pooled(received, blocks):
    """Join the blocks of an item, then average pairs."""
    out = []
    for count in blocks:
        item, received = torch.cat(received[:count]), received[count:]
        out.append(item[: len(item) // 2 * 2].reshape(-1, 2).mean(1))
    return torch.cat(out)


def test_attention_received_within_encoder_blocks(thinker):
    inputs = tiny_inputs(thinker, SAMPLES)
    with torch.no_grad():
        weights, blocks = eager_weights(thinker, inputs)
    expected = pooled([w.mean(0).sum(0) for w in weights], blocks)
    found = adapter_for(thinker).encode(batch_of(thinker, inputs), [AUDIO_NEED]).extra[feature_name(AUDIO_NEED)]
    assert expected.std() > 0.05
    assert torch.allclose(found, expected, rtol=2e-6, atol=1e-6)


def test_global_span_recomputes_attention_over_each_file(thinker):
    inputs = tiny_inputs(thinker, SAMPLES)
    attention = adapter_for(thinker).audio_tower.layers[-1].self_attn
    seen = []
    handle = attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    found = adapter_for(thinker).encode(batch_of(thinker, inputs), [AUDIO_NEED, GLOBAL_NEED]).extra
    handle.remove()
    lengths = [(int(n) - 1) // 2 + 1 for n in inputs["feature_attention_mask"].sum(1)]
    received = []
    with torch.no_grad():
        for item in seen[0].split(lengths):
            query, key = (p(item).unflatten(-1, (2, 16)).transpose(0, 1) for p in (attention.q_proj, attention.k_proj))
            received.append((query @ key.mT / 4).softmax(-1).mean(0).sum(0))
    expected = pooled(received, [1] * len(received))
    assert torch.allclose(found[feature_name(GLOBAL_NEED)], expected, rtol=2e-6, atol=1e-6)
    assert not torch.allclose(found[feature_name(GLOBAL_NEED)], found[feature_name(AUDIO_NEED)], atol=1e-2)


def test_long_segments_go_block_by_block():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1300, 2, 8).unbind(0)
    lengths = [600, 100, 600]
    found = attention_received(query, key, lengths, 0.35)
    expected = torch.cat(
        [
            (q.transpose(0, 1) @ k.permute(1, 2, 0) * 0.35).softmax(-1).mean(0).sum(0)
            for q, k in zip(query.split(lengths), key.split(lengths), strict=True)
        ]
    )
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(torch.stack([part.mean() for part in found.split(lengths)]), torch.ones(3), atol=1e-5)


def test_an_attached_compressor_gets_what_it_needs(thinker):
    inputs = tiny_inputs(thinker, SAMPLES)
    adapter = adapter_for(thinker)
    batch = batch_of(thinker, inputs)
    features = adapter.encode(batch, [AUDIO_NEED])
    needs = adapter.needs(features, batch.layout, [AUDIO_NEED])
    audio = batch.layout.mask(Modality.AUDIO)
    assert torch.equal(needs[AUDIO_NEED][audio], features.extra[feature_name(AUDIO_NEED)])
    assert (needs[AUDIO_NEED][~audio] == 0).all()
    compressor = NeedyCompressor(Settings(retained_ratio=0.3))
    expected = compressor.plan(stock_embeds(thinker, inputs), batch.layout, needs).keep
    with attach(thinker, compressor) as attachment, torch.no_grad():
        thinker(**inputs)
        assert torch.equal(attachment.last_plan.keep, expected)
        attachment.expect(layout=batch.layout, needs=needs)
        thinker(inputs_embeds=stock_embeds_of(adapter, batch, features), position_ids=inputs["position_ids"])
        assert torch.equal(attachment.last_plan.keep, expected)
        thinker(**tiny_inputs(thinker, [[SILENT]]))  # nothing to hear


def stock_embeds_of(adapter, batch, features):
    return adapter.merge(batch.input_ids, features)


def test_cached_features_without_the_statistic(thinker):
    inputs = tiny_inputs(thinker, SAMPLES)
    adapter, batch = adapter_for(thinker), batch_of(thinker, inputs)
    with pytest.raises(BackboneError, match=r"hold no 'audio/attention_received.global'.*cache them again"):
        adapter.needs(adapter.encode(batch, [AUDIO_NEED]), batch.layout, [GLOBAL_NEED])


def test_vision_statistics_are_refused(thinker):
    batch = batch_of(thinker, tiny_inputs(thinker, SAMPLES))
    with pytest.raises(ValueError, match="video tokens is not available"):
        adapter_for(thinker).encode(batch, [Need("attention_received", Modality.VIDEO)])
