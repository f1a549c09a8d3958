"""OmniSIFT in the stock model: both gradient routes select and say the same, and differ in whom they teach."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omnisieve import build_compressor
from omnisieve.backbones import Estimator, attach
from omnisieve.layout import MEDIA
from omnisieve.plan import Plan
from tests.models import FAMILIES, HIDDEN, SILENT, SOUNDING, SPEECH, tiny_inputs, tiny_thinker

SAMPLES = [[SOUNDING], [SILENT], [SPEECH], [SILENT, SILENT]]


@pytest.fixture(scope="module", params=FAMILIES)
def thinker(request):
    return tiny_thinker(family=request.param)


def run(thinker, estimator: Estimator) -> tuple[Tensor, Plan, Tensor, Tensor]:
    """Logits of the last row per sample, the plan, media mask and the gradient of the gate (that of the scores)."""
    torch.manual_seed(0)
    compressor = build_compressor("omnisift", hidden_size=HIDDEN, retained_ratio=0.3, width=16, heads=2).train()
    inputs = tiny_inputs(thinker, SAMPLES, padding_side="right")
    last = inputs["attention_mask"].sum(1) - 1
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[torch.arange(len(SAMPLES)), last] = inputs["input_ids"][torch.arange(len(SAMPLES)), last]
    with attach(thinker, compressor, estimator) as attachment:
        attachment.generator = torch.Generator().manual_seed(1)
        attachment.expect(labels=labels, answer_tokens=len(SAMPLES))
        logits = thinker(**inputs, use_cache=False).logits
        plan, layout = attachment.last_plan, attachment.last_layout
        plan.gate.retain_grad()
        torch.nn.functional.cross_entropy(logits, attachment.targets).backward()
    return logits.detach(), plan, layout.mask(*MEDIA), plan.gate.grad


def test_same_selection_and_same_value(thinker) -> None:
    hard_logits, hard, _, _ = run(thinker, Estimator("hard_drop"))
    for candidates in (1.0, 0.5):
        logits, masked, _, _ = run(thinker, Estimator("masked", candidates))
        assert torch.equal(hard.keep, masked.keep)
        torch.testing.assert_close(logits, hard_logits, rtol=0, atol=1e-5)


def test_hard_drop_gives_dropped_tokens_exactly_nothing(thinker) -> None:
    _, plan, media, grad = run(thinker, Estimator("hard_drop"))
    assert (media & ~plan.keep).any()
    assert (grad[media & ~plan.keep] == 0).all()
    assert (grad[media & plan.keep] != 0).all()


def test_masked_teaches_every_dropped_token_and_sampled_candidates_exactly_those(thinker) -> None:
    _, plan, media, grad = run(thinker, Estimator("masked"))
    assert (grad[media & ~plan.keep] != 0).all()
    _, plan, media, grad = run(thinker, Estimator("masked", 0.5))
    dropped = media & ~plan.keep
    assert (plan.candidates & dropped).sum() not in (0, dropped.sum())
    assert torch.equal((grad != 0) & dropped, plan.candidates)
