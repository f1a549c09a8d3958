"""Visual features behind the first decoder layers: they follow the tokens that stay."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from omnisieve.backbones import adapter_for, attach
from omnisieve.backbones.deepstack import DEEPSTACK, select, take_over
from omnisieve.layout import Modality, TokenLayout
from omnisieve.plan import Merge, Plan, compact
from tests.backbones.toys import NormCompressor, greedy_reference, norm_compressor, stock_prompt
from tests.models import DEEPSTACK_LAYERS, PICTURE, QWEN3, SILENT, SOUNDING, tiny_inputs, tiny_thinker

STEPS = 6


@pytest.fixture(scope="module")
def thinker():
    return tiny_thinker(family=QWEN3)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), side=st.sampled_from(["left", "right"]))
def test_features_stay_with_their_tokens(seed: int, side: str):
    generator = torch.Generator().manual_seed(seed)
    batch, length, width = (int(torch.randint(1, top, (), generator=generator)) for top in (4, 12, 3))
    visual, keep = (torch.rand(batch, length, generator=generator) < 0.5 for _ in range(2))
    visual[0, 0] = True  # the stock model hands nothing over without a visual token
    features = [torch.randn(int(visual.sum()), width, generator=generator) for _ in range(DEEPSTACK_LAYERS)]
    index, mask = compact(keep, int(keep.sum(1).max()), side)
    kwargs = {"visual_pos_masks": visual, "deepstack_visual_embeds": features, "use_cache": True}
    take_over(kwargs, index, mask)
    assert kwargs.keys() == {DEEPSTACK, "use_cache"}
    for found, values in zip(kwargs[DEEPSTACK], features, strict=True):
        everywhere = torch.zeros(batch, length, width)
        everywhere[visual] = values
        expected = [row[kept] for row, kept in zip(everywhere, keep, strict=True)]
        for row, filled, wanted in zip(found, mask, expected, strict=True):
            assert torch.equal(row[filled], wanted)
            assert (row[~filled] == 0).all()


def test_a_layer_with_fewer_tokens_gets_the_features_of_those():
    features = tuple(torch.randn(2, 5, 3) for _ in range(2))
    rows = torch.tensor([[0, 3], [4, 1]])
    kwargs = {DEEPSTACK: features}
    select(kwargs, 1, rows)
    assert torch.equal(kwargs[DEEPSTACK][1], torch.stack([features[1][b, r] for b, r in enumerate(rows)]))
    assert kwargs[DEEPSTACK][0] is features[0]
    for layer, given_ in ((2, {DEEPSTACK: features}), (0, {})):
        before = dict(given_)
        select(given_, layer, rows)
        assert given_ == before


def test_without_visual_tokens_nothing_is_taken_over():
    kwargs = {"visual_pos_masks": None, "deepstack_visual_embeds": None}
    take_over(kwargs, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool))
    assert kwargs == {"visual_pos_masks": None, "deepstack_visual_embeds": None}


class Merging(NormCompressor):
    """Adds half of every sample's first dropped video token to its first kept one."""

    name = "toy_merging"

    def plan(self, embeds: Tensor, layout: TokenLayout, needs=None) -> Plan:
        plan = super().plan(embeds, layout, needs)
        video = layout.mask(Modality.VIDEO)
        source, target = ((video & chosen).int().argmax(dim=1, keepdim=True) for chosen in (~plan.keep, plan.keep))
        weight, own = torch.full_like(source, 0.5, dtype=embeds.dtype), torch.ones(embeds.shape[:2])
        return replace(plan, merge=Merge(source, target, weight, own))


def test_merged_tokens_keep_their_own_features(thinker: nn.Module):
    inputs = tiny_inputs(thinker, [[PICTURE, SOUNDING]])
    adapter, compressor = adapter_for(thinker), Merging(norm_compressor().settings)
    prompt = stock_prompt(thinker, inputs)
    with torch.no_grad():
        plan = compressor.plan(prompt["inputs_embeds"], adapter.layout(inputs["input_ids"], inputs["position_ids"]))
        prompt["inputs_embeds"] = plan.merge.apply(prompt["inputs_embeds"])
        expected = greedy_reference(
            adapter.decoder, adapter.lm_head, prompt, plan.keep[0], inputs["position_ids"][1:], STEPS
        )
        with attach(thinker, compressor):
            assert generated(thinker, inputs) == [expected]


def test_raw_media_are_spread_over_beams(thinker: nn.Module):
    if "mm_encoder_outputs" not in inspect.signature(thinker.forward).parameters:
        pytest.skip("this version of transformers spreads pixels over beams wrongly")
    samples = [[PICTURE, SOUNDING], [SILENT, SILENT]]
    with attach(thinker, norm_compressor()):
        together = generated(thinker, tiny_inputs(thinker, samples), num_beams=3)
        alone = [generated(thinker, tiny_inputs(thinker, [items]), num_beams=3)[0] for items in samples]
    assert together == alone


def generated(model: nn.Module, inputs: dict[str, Tensor], **options) -> list[list[int]]:
    out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **options)
    return out[:, inputs["input_ids"].shape[1] :].tolist()
