"""Every rank calls the same modules in the same order, whatever its samples hold: ZeRO-3 hangs otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omnisieve.backbones import Estimator, adapter_for
from omnisieve.compressors import build_compressor
from omnisieve.compressors.base import Need
from omnisieve.config import LlmSection, LoraSection
from omnisieve.data.batch import Batch
from omnisieve.layout import Modality
from omnisieve.training.build import make_trainable
from omnisieve.training.lockstep import Lockstep
from omnisieve.training.objective import TrainingModule
from tests.models import FAMILIES, PICTURE, QWEN3, SILENT, SOUNDING, SPEECH, Media, tiny_thinker
from tests.training.batches import make_batch, with_features
from tests.training.runs import Alone
from tests.training.test_objective import gradients, make_module

EVERYTHING = frozenset({Modality.IMAGE, Modality.VIDEO, Modality.AUDIO})
KINDS: dict[str, Sequence[Sequence[Media]]] = {
    "everything": [[PICTURE, SOUNDING, SPEECH]],
    "text": [[]],
    "silent": [[SILENT]],
    "sound alone": [[SPEECH], [SPEECH]],
    "image": [[PICTURE], []],
    "mixed": [[SOUNDING], [], [SPEECH]],
}


class Calls:
    """Records calls of modules that have weights, forwards and backwards."""

    def __init__(self, module: nn.Module) -> None:
        self.names: list[str] = []
        for name, part in module.named_modules():
            if next(part.parameters(recurse=False), None) is not None:
                part.register_forward_hook(lambda part, args, output, name=name: self._called(name, output))

    def _called(self, name: str, output: Any) -> None:
        self.names.append(name)
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda gradient: self.names.append(f"{name} backward"))

    def of(self, module: TrainingModule, batch: Batch, **options: Any) -> list[str]:
        """In a training step."""
        self.names.clear()
        gradients(module, [batch], lockstep=EVERYTHING, **options)
        return list(self.names)


LORA = LlmSection(mode="lora", lora=LoraSection(targets=["q_proj", "o_proj"]))
OPTIONS: dict[str, dict[str, Any]] = {
    "masked": {"estimator": Estimator("masked", 0.5)},
    "hard drop, recomputed": {"estimator": Estimator("hard_drop"), "gradient_checkpointing": True},
    "statistics, distilled": {"base": "omnizip", "distill_weight": 0.5},
    "adapters": {"estimator": Estimator("hard_drop"), "llm": LORA},
    "all of the LLM": {"llm": LlmSection(mode="full")},
    "warm start": {"teacher": build_compressor("fastv_om", retained_ratio=0.5)},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OPTIONS)
def test_calls_are_the_same_whatever_a_batch_holds(monkeypatch: pytest.MonkeyPatch, family: str, name: str):
    monkeypatch.setattr("omnisieve.backbones.inner.is_partitioned", lambda decoder: True)
    backbone = tiny_thinker(family=family)
    options = dict(OPTIONS[name])
    make_trainable(adapter_for(backbone), options.pop("llm", LlmSection()))
    module = make_module(backbone, **options)
    calls = Calls(module)
    warm = {"warm_start": name == "warm start"}
    found = {kind: calls.of(module, make_batch(backbone, clips), **warm) for kind, clips in KINDS.items()}
    everything = found.pop("everything")
    assert sum(name.endswith("visual.patch_embed.proj") for name in everything) == 2  # an image and a video
    assert any(name.endswith("backward") for name in everything)
    for kind, names in found.items():
        assert names == everything, kind


def test_long_sound_calls_the_convolutions_no_more_often():
    """The tower of Qwen3-Omni takes so many seconds at a time, 500 in released models."""
    backbone = tiny_thinker(family=QWEN3)
    tower = adapter_for(backbone).audio_tower
    tower.conv_chunksize = 2
    calls = Calls(tower)
    found = []
    for mel in (150, 550):
        calls.names.clear()
        adapter_for(backbone).encode(make_batch(backbone, [[Media(grids=0, mel=mel)]]), lockstep=EVERYTHING)
        found.append(list(calls.names))
    assert found[0] == found[1]
    assert tower.conv_chunksize == 2


NEEDS = (Need("attention_received", Modality.VIDEO, "frame"), Need("keys", Modality.AUDIO))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_media_alone(family: str, kind: str):
    backbone = tiny_thinker(family=family)
    adapter, batch = adapter_for(backbone), make_batch(backbone, KINDS[kind])
    found, expected = (adapter.encode(batch, NEEDS, lockstep) for lockstep in (EVERYTHING, frozenset()))
    for name in ("video", "audio", "image"):
        assert (getattr(expected, name) is None) == (getattr(found, name) is None)
        if getattr(expected, name) is not None:
            assert torch.equal(getattr(found, name), getattr(expected, name))
    assert found.extra.keys() == expected.extra.keys()
    assert all(torch.equal(found.extra[name], values) for name, values in expected.extra.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_beside_other_ranks_has_the_numbers_of_one_alone(family: str):
    backbone = tiny_thinker(family=family)
    module, batch = make_module(backbone, base="omnizip"), make_batch(backbone, KINDS["silent"])
    (loss, found), (expected_loss, expected) = (
        gradients(module, [batch], lockstep=lockstep) for lockstep in (EVERYTHING, frozenset())
    )
    assert loss == expected_loss
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_cached_features_bring_no_call():
    backbone = tiny_thinker()
    batch = make_batch(backbone, KINDS["silent"])
    assert batch.to_encode == {Modality.VIDEO}
    cached = with_features(batch, adapter_for(backbone).encode(batch))
    assert cached.to_encode == frozenset()
    calls = Calls(adapter_for(backbone).audio_tower)
    adapter_for(backbone).encode(cached, lockstep=EVERYTHING)
    assert not calls.names


class Pair(Alone):
    """The first of two ranks; the other has an image in its second micro-batch."""

    def __init__(self) -> None:
        super().__init__(world_size=2)

    def sum(self, values: Sequence[float]) -> list[float]:
        return [value + (place == 3) for place, value in enumerate(values)]


def test_ranks_learn_what_the_others_encode():
    backbone = tiny_thinker()
    window = [make_batch(backbone, KINDS[kind]) for kind in ("text", "sound alone", "silent")]
    assert Lockstep(Pair(), zero_stage=3).media(window) == [
        frozenset(), {Modality.IMAGE, Modality.AUDIO}, {Modality.VIDEO},
    ]  # fmt: skip
    for lockstep in (Lockstep(Pair(), zero_stage=2), Lockstep(Alone(), zero_stage=3)):
        assert lockstep.media(window) == [frozenset()] * 3
