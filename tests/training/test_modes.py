"""The LLM frozen, with adapters, or learning as a whole: losses and gradients on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omnisieve.backbones import BackboneError, Estimator, adapter_for
from omnisieve.backbones.tuning import trainable
from omnisieve.compressors import build_compressor
from omnisieve.config import LlmSection, LoraSection
from omnisieve.training.build import make_trainable
from omnisieve.training.objective import TrainingModule
from tests.models import FAMILIES, HIDDEN, tiny_thinker
from tests.training.batches import CLIPS, make_batch

MODES = ("frozen", "lora", "full")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ROUTES = ("masked", "hard_drop")


def make_module(mode: Any, family: str = FAMILIES[0], ratio: float = 0.25, route: Any = "masked", **fields: Any):
    """A module whose adapters already say something."""
    backbone = tiny_thinker(family=family)
    torch.manual_seed(1)
    compressor = build_compressor(
        "omnisift", hidden_size=HIDDEN, retained_ratio=ratio, width=16, heads=2, pruner_channels=8
    )
    adapter = adapter_for(backbone)
    make_trainable(adapter, LlmSection(mode, lora=LoraSection(rank=4, targets=ATTENTION)))
    for name, parameter in trainable(adapter).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return TrainingModule(backbone, compressor, estimator=Estimator(route), **fields).train()


def step(module: TrainingModule, clips: Any = CLIPS[:3], **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What one forward says, and the gradient of every trainable."""
    batch = make_batch(module.backbone, clips)
    with module.attached():
        outputs = module(batch, **options)
        outputs["loss"].backward()
    learning = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return {name: value.detach() for name, value in outputs.items()}, {n: p.grad.clone() for n, p in learning.items()}


def flat(gradients: dict[str, Tensor], owner: str) -> Tensor:
    return torch.cat([value.flatten() for name, value in gradients.items() if name.startswith(owner)])


def parts(module: nn.Module) -> set[str]:
    return {name.split(".")[0] for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("route", ROUTES)
def test_every_trainable_learns_and_no_encoder_does(mode: str, family: str, route: str):
    module = make_module(mode, family, route=route)
    _, gradients = step(module, CLIPS)
    assert parts(module) == {"compressor"} | ({"backbone"} if mode != "frozen" else set())
    for tower in (module.adapter.audio_tower, module.adapter.visual):
        assert not any(p.requires_grad for p in tower.parameters())
    # Rows of the vocabulary that no sample holds have none; neither have experts that no token went to.
    assert {name for name, value in gradients.items() if not value.any()} == set()


@pytest.mark.parametrize("mode", MODES)
def test_only_adapters_and_compressor_are_float32_beside_bfloat16(mode: str):
    backbone = tiny_thinker(dtype=torch.bfloat16)
    make_trainable(adapter_for(backbone), LlmSection(mode))
    dtypes = {p.dtype for p in backbone.parameters() if p.requires_grad}
    assert dtypes == {"frozen": set(), "lora": {torch.float32}, "full": {torch.bfloat16}}[mode]
    assert {p.dtype for p in backbone.parameters() if not p.requires_grad} <= {torch.bfloat16}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_nothing(mode: str, family: str):
    stored = step(make_module(mode, family), ratio=0.4)
    recomputed = step(make_module(mode, family, gradient_checkpointing=True), ratio=0.4)
    torch.testing.assert_close(recomputed, stored, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("route", ROUTES)
def test_at_ratio_1_the_llm_learns_as_without_a_compressor(mode: str, route: str):
    module = make_module(mode, ratio=1.0, route=route)
    outputs, gradients = step(module)
    bare = make_module(mode, ratio=1.0)
    batch = make_batch(bare.backbone, CLIPS[:3])
    logits = bare.backbone(
        inputs_embeds=bare.adapter.merge(batch.input_ids, bare.adapter.encode(batch)),
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
    ).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    loss.backward()
    torch.testing.assert_close(outputs["cross_entropy"], loss.detach(), rtol=1e-5, atol=1e-5)
    expected = flat({n: p.grad for n, p in bare.named_parameters() if p.grad is not None}, "backbone")
    assert (flat(gradients, "backbone") - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("mode", MODES)
def test_gradient_of_a_batch_is_the_sum_over_its_clips(mode: str):
    _, together = step(make_module(mode), CLIPS)
    alone = [step(make_module(mode), [clip])[1] for clip in CLIPS]
    for owner in parts(make_module(mode)):
        total = sum(flat(gradients, owner) for gradients in alone)
        assert (flat(together, owner) - total).norm() <= 1e-4 * total.norm()


def test_fresh_adapters_say_nothing():
    def loss(mode: str) -> Tensor:
        backbone = tiny_thinker()
        torch.manual_seed(1)
        compressor = build_compressor("omnisift", hidden_size=HIDDEN, retained_ratio=0.25, width=16, heads=2)
        make_trainable(adapter_for(backbone), LlmSection(mode))
        return step(TrainingModule(backbone, compressor).train())[0]["loss"]

    assert torch.equal(loss("lora"), loss("frozen"))


def test_the_teacher_of_distillation_has_no_adapters():
    tuned, _ = step(make_module("lora", ratio=1.0, distill_weight=1.0))
    frozen, _ = step(make_module("frozen", ratio=1.0, distill_weight=1.0))
    assert tuned["divergence"] > 1e-3
    assert frozen["divergence"].abs() < 1e-5
    # And they speak again afterwards.
    module = make_module("lora", ratio=1.0, distill_weight=1.0)
    assert torch.equal(step(module)[0]["cross_entropy"], step(module)[0]["cross_entropy"])


def test_dropout_of_adapters_is_on_in_training_only():
    module = make_module("lora")
    drops = [m for m in module.modules() if type(m).__name__ in ("Dropout", "Identity") and m in lora_dropouts(module)]
    assert drops
    assert all(m.training for m in drops)
    module.eval()
    assert not any(m.training for m in module.modules())


def lora_dropouts(module: nn.Module) -> list[nn.Module]:
    return [part for name, part in module.named_modules() if name.endswith("lora_dropout.default")]


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_that_do_not_exist_are_named(family: str):
    llm = LlmSection("lora", lora=LoraSection(targets=["q_proj", "qkv"]))
    with pytest.raises(BackboneError, match=r"no linear modules qkv; they have .*q_proj"):
        make_trainable(adapter_for(tiny_thinker(family=family)), llm)
