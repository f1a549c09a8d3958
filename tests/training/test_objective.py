"""The loss of a compressor on a frozen LLM."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from omnisieve.backbones import Estimator, adapter_for
from omnisieve.compressors import build_compressor
from omnisieve.data.batch import Batch
from omnisieve.layout import Modality
from omnisieve.training.objective import TrainingModule
from tests.models import FAMILIES, HIDDEN, tiny_thinker
from tests.training.batches import ANSWER_PLACES, CLIPS, make_batch, with_features

ROUTES = [Estimator("masked"), Estimator("masked", 0.5), Estimator("hard_drop")]


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_thinker(family=request.param)


def make_module(backbone: nn.Module, *, ratio: float = 0.25, base: str | None = None, **options) -> TrainingModule:
    torch.manual_seed(0)
    compressor = build_compressor(
        "omnisift", hidden_size=HIDDEN, retained_ratio=ratio, width=16, heads=2, pruner_channels=8, base=base
    )
    return TrainingModule(backbone, compressor, **options).train()


def gradients(module: TrainingModule, batches: list[Batch], **options) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss over micro-batches, and the gradient it leaves in each parameter."""
    module.zero_grad()
    with module.attached():
        total = torch.zeros(())
        for batch in batches:
            loss = module(batch, **options)["loss"]
            loss.backward()
            total = total + loss.detach()
    return total, {name: p.grad.clone() for name, p in module.compressor.named_parameters()}


@pytest.mark.parametrize("estimator", ROUTES, ids=lambda e: f"{e.route}-{e.candidates}")
def test_every_trainable_gets_a_gradient_and_the_llm_none(backbone: nn.Module, estimator: Estimator):
    module = make_module(backbone, estimator=estimator)
    _, found = gradients(module, [make_batch(backbone, CLIPS[:4])])
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert any(gradient.abs().sum() > 0 for gradient in found.values())


@pytest.mark.parametrize("clips", [[CLIPS[1]], [CLIPS[2]], [[]]], ids=["silent", "audio only", "text only"])
def test_no_trainable_is_left_out_where_a_modality_is_missing(backbone: nn.Module, clips: list):
    _, found = gradients(make_module(backbone), [make_batch(backbone, clips)])
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_one_batch_of_four_is_four_batches_of_one(backbone: nn.Module):
    module = make_module(backbone)
    loss, together = gradients(module, [make_batch(backbone, CLIPS[:4])])
    expected, apart = gradients(module, [make_batch(backbone, [clip]) for clip in CLIPS[:4]])
    torch.testing.assert_close(loss, expected)
    # A bias that shifts all logits alike has a gradient of rounding errors, which are as large as those of the rest.
    norm = float(torch.cat([gradient.flatten() for gradient in apart.values()]).norm())
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-6 * norm)


@pytest.mark.parametrize("base", ["stvp", "divprune_om"])
def test_untrained_the_loss_is_that_of_the_base(backbone: nn.Module, base: str):
    batch = make_batch(backbone, CLIPS[:4])
    found = [make_module(backbone, base=base), TrainingModule(backbone, build_compressor(base, retained_ratio=0.25))]
    losses = []
    for module in found:
        with module.attached(), torch.no_grad():
            losses.append(module(batch)["cross_entropy"])
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("estimator", ROUTES, ids=lambda e: f"{e.route}-{e.candidates}")
def test_a_base_that_needs_statistics_is_trained(backbone: nn.Module, estimator: Estimator):
    """Gradients reach the last layers first; the others get theirs when those are not zero any more."""
    module, batch = make_module(backbone, base="omnizip", estimator=estimator), make_batch(backbone, CLIPS[:4])
    optimizer = torch.optim.SGD(module.compressor.parameters(), lr=0.1)
    _, first = gradients(module, [batch])
    assert first["selector.score_head.2.weight"].abs().sum() > 0
    assert first["pruner.cnn.5.weight"].abs().sum() > 0
    optimizer.step()
    _, second = gradients(module, [batch])
    assert second["selector.v_proj.weight"].abs().sum() > 0
    assert second["pruner.cnn.0.weight"].abs().sum() > 0


def gate_gradient(module: TrainingModule, batch: Batch, scale: float = 1.0) -> Tensor:
    """[B, S], as it goes on to the scores."""
    with module.attached():
        loss = module(batch, scale=scale)["loss"]
        gate = module._attachment.last_plan.gate
        gate.retain_grad()
        loss.backward()
    return gate.grad


def test_gate_clip_limits_each_clip_by_itself(backbone: nn.Module):
    batch, limit = make_batch(backbone, CLIPS[:4]), 2.5
    free = gate_gradient(make_module(backbone), batch)
    clipped = gate_gradient(make_module(backbone, gate_clip=limit), batch)
    norms = free.norm(dim=1)
    assert norms.max() > limit
    torch.testing.assert_close(clipped.norm(dim=1), norms.clamp(max=limit))
    cosine = nn.functional.cosine_similarity(clipped, free, dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    for row, clip in enumerate(CLIPS[:4]):
        alone = gate_gradient(make_module(backbone, gate_clip=limit), make_batch(backbone, [clip]))
        torch.testing.assert_close(clipped[row, : alone.shape[1]], alone[0], rtol=1e-3, atol=1e-4)


def test_gate_clip_is_in_units_of_the_unscaled_loss(backbone: nn.Module):
    batch = make_batch(backbone, CLIPS[:4])
    one, half = (gate_gradient(make_module(backbone, gate_clip=2.5), batch, scale) for scale in (1.0, 0.5))
    torch.testing.assert_close(half, 0.5 * one)


def test_cached_features_are_online_encoding(backbone: nn.Module):
    module, batch = make_module(backbone, distill_weight=0.5), make_batch(backbone, CLIPS[:4])
    cached = with_features(batch, adapter_for(backbone).encode(batch))
    torch.testing.assert_close(gradients(module, [batch]), gradients(module, [cached]))


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_recomputes_and_changes_nothing(family: str):
    batch = make_batch(tiny_thinker(family=family), CLIPS[:3])
    found = []
    for recompute in (False, True):
        backbone, calls = tiny_thinker(family=family), []
        adapter_for(backbone).layers[1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        found.append(gradients(make_module(backbone, gradient_checkpointing=recompute), [batch]))
        assert len(calls) == 1 + recompute
    torch.testing.assert_close(*found)


def test_candidates_are_a_function_of_the_seed(backbone: nn.Module):
    module, batch = make_module(backbone, estimator=Estimator("masked", 0.3)), make_batch(backbone, CLIPS[:4])
    (one, first), (two, second), (three, other) = (gradients(module, [batch], seed=s) for s in (1, 1, 2))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(one, three)  # which dropped tokens are taught does not change the value
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_ratio_of_one_forward(backbone: nn.Module):
    module, batch = make_module(backbone), make_batch(backbone, CLIPS[:4])
    media = batch.layout.counts(Modality.VIDEO, Modality.AUDIO).sum()
    with module.attached(), torch.no_grad():
        for ratio in (0.25, 0.5, None):
            outputs = module(batch, ratio=ratio)
            kept = int(outputs["kept_video"] + outputs["kept_audio"])
            assert abs(kept - (ratio or 0.25) * media) <= len(batch)


def test_distillation_is_nothing_at_ratio_one_and_something_below(backbone: nn.Module):
    batch = make_batch(backbone, CLIPS[:4])
    for ratio, expected in ((1.0, True), (0.25, False)):
        module = make_module(backbone, ratio=ratio, distill_weight=2.0)
        with module.attached():
            outputs = module(batch)
        assert (outputs["divergence"].item() == pytest.approx(0, abs=1e-3)) is expected
        assert outputs["loss"].item() == pytest.approx(
            outputs["cross_entropy"].item() + 2.0 * outputs["divergence"].item(), rel=1e-5
        )


def test_loss_and_accuracy_are_those_of_the_stock_model(backbone: nn.Module):
    """At ratio 1, with labels such that in every other sample the last answer is right."""
    batch, adapter = make_batch(backbone, CLIPS[:4]), adapter_for(backbone)
    features = adapter.encode(batch)
    with torch.no_grad(), adapter.deepstack(features, batch.layout):
        stock = backbone(
            inputs_embeds=adapter.merge(batch.input_ids, features),
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        ).logits
    labels = batch.labels.clone()
    lengths = batch.attention_mask.sum(1).tolist()
    for row, length in enumerate(lengths):
        if row % 2:
            labels[row, length - 1] = stock[row, length - 2].argmax()
        labels[row, length - 4] = stock[row, length - 5].argmax()  # half of the first answer
    expected = sum(
        nn.functional.cross_entropy(stock[row, length - place - 1], labels[row, length - place])
        for row, length in enumerate(lengths)
        for place in ANSWER_PLACES
    )
    module = make_module(backbone, ratio=1.0).eval()
    with module.attached(), torch.no_grad():
        outputs = module(replace(batch, labels=labels))
    torch.testing.assert_close(outputs["cross_entropy"], expected)
    assert outputs["answers"] == 8
    assert outputs["correct_answers"] == 2
    assert outputs["correct_tokens"] == 6


def test_training_mode_reaches_the_compressor_only(backbone: nn.Module):
    module = make_module(backbone)
    assert module.compressor.training
    assert not any(part.training for part in backbone.modules())
    assert not module.eval().compressor.training
