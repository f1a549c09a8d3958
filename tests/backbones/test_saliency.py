"""Statistics reach the tokens that they belong to, from a stock forward as from the encoders alone."""

from __future__ import annotations

import pytest
import torch

from omnisieve.backbones import BackboneError, adapter_for, attach, feature_name
from omnisieve.compressors.base import CompressorError, Need, Settings
from omnisieve.data.batch import Batch
from omnisieve.layout import Modality
from tests.backbones.toys import AUDIO_NEED, NeedyCompressor, NormCompressor, stock_embeds
from tests.models import FAMILIES, PICTURE, SILENT, SOUNDING, SPEECH, Media, tiny_inputs, tiny_thinker

NEEDS = (
    AUDIO_NEED,
    Need("attention_received", Modality.AUDIO, "global"),
    Need("keys", Modality.AUDIO),
    Need("attention_received", Modality.VIDEO, "window"),
    Need("mean_query_attention", Modality.VIDEO, "frame"),
    Need("keys", Modality.VIDEO),
)
SAMPLES = [[SOUNDING], [SILENT], [SPEECH, Media(grids=0, mel=207)]]
MIXED = [[SOUNDING, PICTURE, Media(grids=1, rows=2, columns=2, mel=120)], [PICTURE, SPEECH]]
MEDIA = {
    "mixed": MIXED,
    "silent": [[SILENT, Media(grids=5)], [SILENT]],
    "image only": [[PICTURE]],
    "audio only": [[SPEECH]],
}


class Recorder(NormCompressor):
    """Needs everything and keeps what it was given."""

    name = "toy_recorder"
    needs = NEEDS

    def scores(self, embeds, layout, needs):
        self.given = dict(needs)
        return super().scores(embeds, layout, needs)


@pytest.fixture(scope="module", params=FAMILIES)
def thinker(request):
    return tiny_thinker(family=request.param)


def batch_of(model, inputs):
    layout = adapter_for(model).layout(inputs["input_ids"], inputs["position_ids"], inputs["attention_mask"])
    return Batch(layout=layout, labels=inputs["input_ids"], **inputs)


def measured(model, samples):
    """Statistics [B, S, ...] of a batch from the encoders alone."""
    adapter, batch = adapter_for(model), batch_of(model, tiny_inputs(model, samples))
    return batch.layout, adapter.needs(adapter.encode(batch, NEEDS), batch.layout, NEEDS)


@pytest.mark.parametrize("samples", MEDIA.values(), ids=MEDIA)
def test_a_stock_forward_gives_the_statistics_of_the_encoders_alone(thinker, samples):
    layout, expected = measured(thinker, samples)
    compressor = Recorder(Settings(retained_ratio=0.5))
    with attach(thinker, compressor), torch.no_grad():
        thinker(**tiny_inputs(thinker, samples))
    for need in NEEDS:
        assert torch.equal(compressor.given[need], expected[need]), need
        inside = layout.mask(need.modality)
        assert (expected[need][~inside] == 0).all()
        assert (expected[need][inside] != 0).any() == inside.any()


def test_a_sample_has_the_same_statistics_alone_and_in_a_batch(thinker):
    layout, together = measured(thinker, MIXED)
    for row, sample in enumerate(MIXED):
        own, alone = measured(thinker, [sample])
        for need in NEEDS:
            values = [s[need][b][m.mask(need.modality)[b]] for s, m, b in ((together, layout, row), (alone, own, 0))]
            assert values[0].shape[0] == values[1].shape[0] == layout.counts(need.modality)[row]
            if len(values[0]):
                assert torch.allclose(*values, rtol=1e-4, atol=1e-5), need


def test_an_attached_compressor_gets_what_it_needs(thinker):
    inputs = tiny_inputs(thinker, SAMPLES)
    adapter = adapter_for(thinker)
    batch = batch_of(thinker, inputs)
    features = adapter.encode(batch, [AUDIO_NEED])
    needs = adapter.needs(features, batch.layout, [AUDIO_NEED])
    audio = batch.layout.mask(Modality.AUDIO)
    assert torch.equal(needs[AUDIO_NEED][audio], features.extra[feature_name(AUDIO_NEED)])
    compressor = NeedyCompressor(Settings(retained_ratio=0.3))
    expected = compressor.plan(stock_embeds(thinker, inputs), batch.layout, needs).keep
    embeds = adapter.merge(batch.input_ids, features)
    with attach(thinker, compressor) as attachment, torch.no_grad():
        thinker(**inputs)
        assert torch.equal(attachment.last_plan.keep, expected)
        attachment.expect(layout=batch.layout, needs=needs)
        with adapter.deepstack(features, batch.layout):
            thinker(inputs_embeds=embeds, position_ids=inputs["position_ids"])
        assert torch.equal(attachment.last_plan.keep, expected)
        thinker(**tiny_inputs(thinker, [[SILENT]]))  # nothing to hear


def test_only_what_was_asked_for_is_computed(thinker):
    extra = adapter_for(thinker).encode(batch_of(thinker, tiny_inputs(thinker, MIXED)), [NEEDS[3]]).extra
    assert [name for name in extra if "deepstack" not in name] == ["video/attention_received.window"]


def test_cached_features_without_the_statistic(thinker):
    adapter, batch = adapter_for(thinker), batch_of(thinker, tiny_inputs(thinker, SAMPLES))
    with pytest.raises(BackboneError, match=r"hold no 'audio/attention_received.global'.*cache them again"):
        adapter.needs(adapter.encode(batch, [AUDIO_NEED]), batch.layout, NEEDS[1:2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("attention_received", Modality.AUDIO, "frame"), "'frame'; possible are 'encoder', 'window', 'global'"),
        (("attention_received", Modality.IMAGE), "of image tokens does not exist .* possible are none"),
        (("keys", Modality.VIDEO, "global"), "'global'; possible are 'encoder'"),
        (("mean_query_attention", Modality.VIDEO), "'encoder'; possible are 'frame'"),
        (("mean_query_attention", Modality.AUDIO, "frame"), "possible are none"),
        (("values", Modality.VIDEO), "'values'; there are attention_received, keys, mean_query_attention"),
    ],
)
def test_what_no_encoder_gives_cannot_be_declared(fields, message):
    with pytest.raises(CompressorError, match=message):
        Need(*fields)
