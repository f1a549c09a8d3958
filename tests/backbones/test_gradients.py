"""The gradient routes: equal values, and who is taught."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from omnisieve.backbones import Estimator, adapter_for, attach
from omnisieve.backbones.gated_attention import GATED, gated_attention
from omnisieve.layout import MEDIA, Modality
from omnisieve.plan import Plan
from tests.backbones.toys import LearnedToy, learned_toy
from tests.models import FAMILIES, HIDDEN, SILENT, SOUNDING, SPEECH, checkpoint_layers, tiny_inputs, tiny_thinker

SAMPLES = [[SOUNDING], [SILENT], [SPEECH]]
ANSWER = 3


@pytest.fixture(scope="module", params=FAMILIES)
def thinker(request):
    return tiny_thinker(family=request.param)


def answers(inputs: dict[str, Tensor]) -> Tensor:
    """Labels: the last tokens of every sample are its answer."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, mask in enumerate(inputs["attention_mask"]):
        place = mask.nonzero()[-ANSWER:, 0]
        labels[row, place] = inputs["input_ids"][row, place]
    return labels


def run(model, compressor, estimator, samples=SAMPLES, padding_side="right", seed=0):
    """Loss, answer logits and plan of one forward; the scores' gradient is in `compressor.latest.grad`."""
    inputs = tiny_inputs(model, samples, padding_side=padding_side)
    with attach(model, compressor, estimator) as attachment:
        attachment.generator = torch.Generator().manual_seed(seed)
        attachment.expect(labels=answers(inputs), answer_tokens=ANSWER * len(samples))
        logits = model(**inputs, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits, attachment.targets, reduction="sum")
        loss.backward()
    return loss.detach(), logits.detach(), attachment


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("candidates", [1.0, 0.5])
def test_routes_agree_in_selection_and_value(padding_side, attention, candidates):
    model = tiny_thinker(attention=attention)
    _, hard, first = run(model, learned_toy(HIDDEN), Estimator("hard_drop"), padding_side=padding_side)
    _, masked, second = run(model, learned_toy(HIDDEN), Estimator("masked", candidates), padding_side=padding_side)
    assert torch.equal(first.last_plan.keep, second.last_plan.keep)
    assert hard.shape == (ANSWER * len(SAMPLES), model.config.get_text_config().vocab_size)
    assert (hard - masked).abs().max() < 1e-5
    assert model.config.get_text_config()._attn_implementation == attention


def test_bfloat16_routes_agree():
    model = tiny_thinker(dtype=torch.bfloat16)
    _, hard, _ = run(model, learned_toy(HIDDEN), Estimator("hard_drop"))
    _, masked, _ = run(model, learned_toy(HIDDEN), Estimator("masked"))
    assert masked.isfinite().all()
    assert (hard.float() - masked.float()).norm() < 0.02 * hard.float().norm()


def grads(compressor: LearnedToy, attachment) -> tuple[Tensor, Tensor, Tensor]:
    plan, layout = attachment.last_plan, attachment.last_layout
    return compressor.latest.grad, plan.keep, layout.mask(*MEDIA)


def test_hard_drop_teaches_kept_tokens_only(thinker):
    compressor = learned_toy(HIDDEN)
    grad, keep, media = grads(compressor, run(thinker, compressor, Estimator("hard_drop"))[2])
    assert (grad[keep & media] != 0).all()
    assert (grad[~keep] == 0).all()


def test_masked_teaches_every_dropped_token(thinker):
    compressor = learned_toy(HIDDEN)
    grad, keep, media = grads(compressor, run(thinker, compressor, Estimator("masked"))[2])
    assert (grad[media] != 0).all()
    assert (grad[~media] == 0).all()
    assert (media & ~keep).any()


def test_masked_with_sampled_candidates_teaches_exactly_those(thinker):
    compressor = learned_toy(HIDDEN)
    attachment = run(thinker, compressor, Estimator("masked", 0.4))[2]
    grad, keep, media = grads(compressor, attachment)
    candidates = attachment.last_plan.candidates
    assert (candidates.sum(1).numpy() == attachment.last_plan.candidate_counts).all()
    assert (media & ~keep & ~candidates).any()
    assert torch.equal(grad != 0, media & (keep | candidates))


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_no_token_is_taught_by_its_batch(thinker, padding_side):
    """Gradients of a padded batch are those of its samples alone."""
    compressor = learned_toy(HIDDEN)
    run(thinker, compressor, Estimator("masked"), padding_side=padding_side)
    together = compressor.scorer.weight.grad.clone()
    compressor.zero_grad()
    for sample in SAMPLES:
        run(thinker, compressor, Estimator("masked"), [sample])
    assert torch.allclose(compressor.scorer.weight.grad, together, rtol=1e-4, atol=1e-7)


def wide_norm(self, x):
    return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


class GivenGate(LearnedToy):
    """Selection by norm; the gate of the media tokens is a free tensor."""

    gate: Tensor

    def plan(self, embeds, layout, needs=None):
        with torch.no_grad():
            keep = super().plan(embeds, layout, needs).keep
        if not hasattr(self, "gate"):
            self.gate = keep.to(embeds.dtype).masked_fill(~layout.mask(*MEDIA), 1.0).requires_grad_()
        counts = keep.sum(1).numpy()
        return Plan(keep=keep, kept=counts, gate=self.gate)


def test_gate_gradient_is_the_central_difference(monkeypatch):
    model = tiny_thinker(dtype=torch.float64)
    # The stock norm computes in float32, whose noise would drown the difference.
    monkeypatch.setattr(type(adapter_for(model).decoder.norm), "forward", wide_norm)
    samples = [[SILENT], [SPEECH]]
    compressor = GivenGate(learned_toy(HIDDEN).settings, HIDDEN, torch.float64)
    _, _, attachment = run(model, compressor, Estimator("masked"), samples)
    layout, keep, gradient = attachment.last_layout, attachment.last_plan.keep, compressor.gate.grad.clone()
    base = compressor.gate.detach()
    step = 1e-5
    for row, kind in ((0, Modality.VIDEO), (1, Modality.AUDIO)):
        for kept in (True, False):
            place = int((layout.mask(kind)[row] & (keep[row] == kept)).nonzero()[4])
            losses = []
            for sign in (1, -1):
                gate = base.clone()
                gate[row, place] += sign * step
                compressor.gate = gate.requires_grad_()
                losses.append(run(model, compressor, Estimator("masked"), samples)[0])
            central = (losses[0] - losses[1]) / (2 * step)
            assert gradient[row, place] == pytest.approx(float(central), rel=1e-3)


@pytest.mark.parametrize("route", ["hard_drop", "masked"])
def test_gradient_checkpointing_changes_nothing(route):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_thinker()
        if checkpointing:
            checkpoint_layers(model)
            model.train()
        compressor = learned_toy(HIDDEN)
        loss = run(model, compressor, Estimator(route))[0]
        gradients.append((loss, compressor.scorer.weight.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert gradients[0][1].abs().max() > 0
    assert torch.allclose(*[g for _, g in gradients], rtol=1e-5)


def test_teacher_sees_all_tokens_at_the_same_rows(thinker):
    inputs = tiny_inputs(thinker, SAMPLES, padding_side="right")
    labels = answers(inputs)
    expected = thinker(**inputs).logits[labels.roll(-1, dims=1) != -100]
    with torch.no_grad(), attach(thinker, learned_toy(HIDDEN), Estimator("masked")) as attachment:
        with attachment.paused():
            attachment.expect(labels=labels, answer_tokens=ANSWER * len(SAMPLES))
            # Not bit for bit: the head runs on fewer rows.
            torch.testing.assert_close(thinker(**inputs).logits, expected, rtol=0, atol=1e-5)
        assert torch.equal(attachment.targets, labels[labels != -100])
        attachment.expect(labels=labels, answer_tokens=ANSWER * len(SAMPLES))
        assert thinker(**inputs).logits.shape == expected.shape
        assert torch.equal(attachment.targets, labels[labels != -100])
        # Labels are used up, too.
        assert thinker(**inputs).logits.dim() == 3


def test_ratio_one_in_training_still_teaches(thinker):
    compressor = learned_toy(HIDDEN, ratio=1.0)
    grad, keep, media = grads(compressor, run(thinker, compressor, Estimator("masked"))[2])
    assert keep[media].all()
    assert (grad[media] != 0).all()


def test_gated_attention_alone():
    torch.manual_seed(0)
    batch, heads, kv_heads, length, width = 2, 4, 2, 7, 6
    query = torch.randn(batch, heads, length, width, dtype=torch.float64)
    key, value = (torch.randn(batch, kv_heads, length, width, dtype=torch.float64) for _ in range(2))
    gate = torch.rand(batch, length, dtype=torch.float64)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads // kv_heads, True
    found, weights = gated_attention(module, query, key, value, None, key_gate=gate, scaling=0.3)
    wide_key, wide_value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    logits = (query @ wide_key.mT * 0.3).masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
    factors = logits.softmax(-1) * gate[:, None, None]
    expected = (factors / factors.sum(-1, keepdim=True)) @ wide_value
    assert weights is None
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-12)


def test_rows_that_see_no_gate_stay_finite():
    query = torch.randn(1, 1, 3, 4, requires_grad=True)
    gate = torch.zeros(1, 3, requires_grad=True)
    found, _ = gated_attention(nn.Module(), query, query, query, None, key_gate=gate)
    found[:, -1].sum().backward()
    assert (found == 0).all()
    assert query.grad.isfinite().all()
    assert gate.grad.isfinite().all()


def test_gated_attention_is_off_outside(thinker):
    config = adapter_for(thinker).decoder.config
    inputs = tiny_inputs(thinker, SAMPLES)
    with attach(thinker, learned_toy(HIDDEN), Estimator("masked")):
        thinker(**inputs, use_cache=False)
        assert config._attn_implementation == GATED
        with torch.no_grad():
            thinker(**inputs)  # validation: no gates
        assert config._attn_implementation == "sdpa"
        thinker(**inputs, use_cache=False)
    assert config._attn_implementation == "sdpa"
