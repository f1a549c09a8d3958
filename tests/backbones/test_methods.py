"""Every method on a stock model of each family: what it processes, what a batch changes, what it leaves behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from omnisieve.backbones import adapter_for, attach
from omnisieve.compressors import Compressor
from omnisieve.compressors.inner import InnerCompressor
from omnisieve.data.batch import Batch
from tests.backbones.test_attach import MIXED, hooks_of, layout_of
from tests.compressors.cases import ALL, HEAD, build, label
from tests.models import FAMILIES, HIDDEN, PICTURE, QWEN2_5, QWEN3, SOUNDING, SPEECH, tiny_inputs, tiny_thinker
from tests.waiting import NoWaiting

Case = tuple[str, dict[str, Any]]
LAYERS, STEPS = 6, 6
SAMPLES = [*MIXED, [PICTURE, SOUNDING, SPEECH]]
# All methods reach these on these samples.
RATIOS = {"video_ratio": 0.5, "audio_ratio": 0.7}
FAST = {(QWEN2_5, "omnizip"), (QWEN2_5, "seats"), (QWEN3, "visionzip_om"), (QWEN3, "omnidrop")}


def everywhere(test: Callable) -> Callable:
    """Parametrizes a test by family and method; among the fast ones are encoder needs, merges and cuts inside."""
    cells = [
        pytest.param(
            family,
            case,
            marks=() if (family, case[0]) in FAST and not case[1] else pytest.mark.slow,
            id=f"{family}-{label(case)}",
        )
        for family, case in itertools.product(FAMILIES, ALL)
    ]
    return pytest.mark.parametrize(("family", "case"), cells)(test)


@cache
def thinker_of(family: str) -> nn.Module:
    return tiny_thinker(layers=LAYERS, family=family)


def compressor_of(case: Case, **ratios: float) -> Compressor:
    compressor = build(case, hidden_size=HIDDEN, **ratios)
    return compressor.for_depth(LAYERS) if isinstance(compressor, InnerCompressor) else compressor


def greedy(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


@everywhere
@torch.no_grad()
def test_ratio_one_is_bit_identical(family: str, case: Case) -> None:
    model = thinker_of(family)
    inputs = tiny_inputs(model, SAMPLES)
    logits, tokens = model(**inputs).logits, greedy(model, inputs)
    with attach(model, compressor_of(case, retained_ratio=1.0)):
        assert torch.equal(model(**inputs).logits, logits)
        assert greedy(model, inputs) == tokens


@everywhere
@torch.no_grad()
def test_a_batch_is_its_samples_and_the_model_is_left_as_it_was(family: str, case: Case) -> None:
    model, compressor = thinker_of(family), compressor_of(case, **RATIOS)
    hooks, attributes = hooks_of(model), set(vars(model)) | set(vars(model.model))
    with attach(model, compressor) as attachment:
        alone = [tiny_inputs(model, [items]) for items in SAMPLES]
        together = tiny_inputs(model, SAMPLES, padding_side="right")
        logits = model(**together, use_cache=False).logits
        layout, plan = attachment.last_layout, attachment.last_plan
        counts = attachment.layer_counts().sum(axis=-1)
        np.testing.assert_array_equal(attachment.compressor.budget(layout).total, counts.mean(axis=0).round())
        if isinstance(compressor, InnerCompressor):
            np.testing.assert_array_equal(counts, compressor.layer_counts(layout))
        for row, inputs in enumerate(alone):
            single = model(**inputs, use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, : len(single)], single, rtol=0, atol=5e-5)
            assert plan.kept[row] == attachment.last_plan.kept[0]
        assert greedy(model, tiny_inputs(model, SAMPLES)) == [greedy(model, inputs)[0] for inputs in alone]
    assert hooks_of(model) == hooks
    assert set(vars(model)) | set(vars(model.model)) == attributes


@everywhere
@torch.no_grad()
def test_a_training_forward_never_waits(family: str, case: Case) -> None:
    """From embeddings and a layout to answer logits: methods, and the hooks around them.

    In prefill the stock code looks whether there is padding, and in Qwen3 it selects by mask where nothing is dropped.
    """
    if case[0] == "full":
        pytest.skip("runs the stock code alone")
    model = tiny_thinker(layers=LAYERS, family=family)
    if family == QWEN3:
        model.set_experts_implementation("batched_mm")  # the default one wants bfloat16 on meta
    adapter, inputs = adapter_for(model), tiny_inputs(model, SAMPLES, padding_side="right")
    layout = layout_of(model, inputs).to("meta")
    features = adapter.encode(Batch(layout=layout, labels=inputs["input_ids"], **inputs)).to("meta")
    model.to("meta")
    embeds = adapter.merge(inputs["input_ids"].to("meta"), features)
    labels = torch.full(inputs["input_ids"].shape, -100, device="meta")
    positions = inputs["position_ids"][1:].to("meta")
    compressor = compressor_of(case, **RATIOS).to("meta")
    needs = {
        need: torch.empty(*layout.modality.shape, *[HEAD] * (need.kind == "keys"), device="meta")
        for need in compressor.needs
    }
    with attach(model, compressor) as attachment, adapter.deepstack(features, layout), NoWaiting():
        attachment.expect(layout=layout, needs=needs, labels=labels, answer_tokens=7)
        logits = model(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits
    assert logits.shape[0] == 7
