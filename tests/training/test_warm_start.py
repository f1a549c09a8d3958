"""A warm start teaches the order in which a method inside the LLM ranks tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from omnisieve.backbones import adapter_for, attach
from omnisieve.compressors import build_compressor
from omnisieve.compressors.inner import InnerCompressor
from omnisieve.compressors.ranked import Ranked
from omnisieve.data.batch import Batch
from omnisieve.layout import MEDIA, Modality
from omnisieve.training.objective import TrainingModule
from omnisieve.training.warm_start import Listener, order_loss
from tests.compressors.cases import Batch as Layouts
from tests.models import FAMILIES, HIDDEN, tiny_thinker
from tests.training.batches import CLIPS, make_batch

# The least depths at which each has a layer to score in.
TEACHERS = {"fastv_om": 3, "omnidrop": 3, "seats": 8}


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_thinker(family=request.param)


def make_module(backbone: nn.Module, teacher: str = "fastv_om", **settings) -> TrainingModule:
    torch.manual_seed(0)
    small = {"retained_ratio": 0.25, "width": 16, "heads": 2, "pruner_channels": 8}
    compressor = build_compressor("omnisift", hidden_size=HIDDEN, **(small | settings))
    return TrainingModule(backbone, compressor, teacher=method(teacher)).train()


def method(name: str) -> InnerCompressor:
    return build_compressor(name, retained_ratio=0.5)


def gradients(module: TrainingModule, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    with module.attached():
        losses = [module(batch, warm_start=True)["loss"] for batch in batches]
        torch.stack(losses).sum().backward()
    return torch.stack(losses).sum().detach(), {n: p.grad.clone() for n, p in module.compressor.named_parameters()}


def heard_by(listener: InnerCompressor, backbone: nn.Module, batch: Batch) -> Tensor:
    adapter = adapter_for(backbone)
    features = adapter.encode(batch)
    with attach(backbone, listener) as attachment, torch.no_grad(), adapter.deepstack(features, batch.layout):
        attachment.expect(layout=batch.layout, labels=batch.labels, answer_tokens=sum(batch.answer_tokens))
        backbone(
            inputs_embeds=adapter.merge(batch.input_ids, features),
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
        return attachment.compressor.heard


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_compressor_comes_to_keep_what_the_teacher_would_keep(teacher: str):
    backbone = tiny_thinker(layers=TEACHERS[teacher])
    module, batch = make_module(backbone, teacher), make_batch(backbone, CLIPS)
    optimizer = torch.optim.Adam(module.compressor.parameters(), lr=1e-2)
    agreed = []
    with module.attached():
        for _ in range(25):
            outputs = module(batch, scale=1 / len(batch), warm_start=True)
            agreed.append((outputs["agreeing"] / outputs["chosen"]).item())
            optimizer.zero_grad()
            outputs["loss"].backward()
            optimizer.step()
    assert agreed[0] < 0.35  # the share of tokens that are kept is 0.25
    assert agreed[-1] > agreed[0] + 0.15
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_the_listener_hears_what_the_method_hears(backbone: nn.Module):
    class Recorder(type(method("fastv_om"))):
        def keep_after(self, cut, scores, alive, layout):
            self.heard = scores
            return super().keep_after(cut, scores, alive, layout)

    batch = make_batch(backbone, CLIPS[:4])
    recorder = Recorder(replace(method("fastv_om").settings, first=None))
    expected, heard = (heard_by(who, backbone, batch) for who in (recorder, Listener(method("fastv_om"))))
    torch.testing.assert_close(heard, expected, rtol=0, atol=0)
    assert (heard[batch.layout.mask(*MEDIA)] > 0).all()


def test_the_teacher_has_not_seen_the_answers(backbone: nn.Module):
    batch = make_batch(backbone, CLIPS[:4])
    other = torch.where(batch.labels >= 0, 20, batch.input_ids)
    assert not torch.equal(other, batch.input_ids)
    heard = [
        heard_by(Listener(method("fastv_om")), backbone, replace(batch, input_ids=ids))
        for ids in (batch.input_ids, other)
    ]
    torch.testing.assert_close(*heard)


def test_one_batch_of_four_is_four_batches_of_one(backbone: nn.Module):
    module = make_module(backbone)
    together = gradients(module, [make_batch(backbone, CLIPS[:4])])
    apart = gradients(module, [make_batch(backbone, [clip]) for clip in CLIPS[:4]])
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("clips", [[CLIPS[1]], [CLIPS[2]], [[]]], ids=["silent", "audio only", "text only"])
def test_no_trainable_is_left_out_where_a_modality_is_missing(backbone: nn.Module, clips: list):
    loss, found = gradients(make_module(backbone), [make_batch(backbone, clips)])
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert (loss > 0) == bool(clips[0])


def test_the_similarity_pruner_is_taught_nothing(backbone: nn.Module):
    module, batch = make_module(backbone, video_pruner="similarity"), make_batch(backbone, CLIPS[:4])
    with module.attached():
        outputs = module(batch, warm_start=True)
    assert outputs["chosen"] == outputs["kept_audio"]
    assert outputs["kept_video"] > 0


def test_a_base_and_a_teacher_go_together(backbone: nn.Module):
    module, batch = make_module(backbone, base="omnizip"), make_batch(backbone, CLIPS[:4])
    _, found = gradients(module, [batch])
    assert found["selector.score_head.2.weight"].abs().sum() > 0


class TestOrderLoss:
    batch = Layouts(["audio_video", "silent", "text_only"])

    def parts(self, logits: Tensor) -> list[Ranked]:
        layout = self.batch.layout
        return [
            build_compressor("stvp", retained_ratio=0.25).ranked(modality, logits, layout)
            for modality in (Modality.VIDEO, Modality.AUDIO)
        ]

    def teacher(self) -> Tensor:
        return torch.rand(self.batch.layout.modality.shape, generator=torch.Generator().manual_seed(3)) + 0.1

    def test_is_zero_for_the_places_themselves_and_any_constant_beside_them(self):
        teacher = self.teacher()
        places = sum(part.even_scores() for part in self.parts(teacher))
        torch.testing.assert_close(order_loss(self.parts(places + 7), teacher), torch.zeros(3))
        assert (order_loss(self.parts(-places), teacher)[:2] > 1).all()

    def test_knows_the_order_of_the_teacher_only(self):
        teacher, logits = self.teacher(), torch.randn(self.batch.layout.modality.shape)
        losses = [order_loss(self.parts(logits), values) for values in (teacher, 1e-6 * teacher**9)]
        torch.testing.assert_close(*losses, rtol=0, atol=0)

    def test_what_is_not_attended_to_teaches_nothing(self):
        logits = torch.randn(self.batch.layout.modality.shape)
        assert torch.equal(order_loss(self.parts(logits), torch.zeros_like(logits)), torch.zeros(3))
