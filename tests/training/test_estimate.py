"""The estimate of a rank's memory against what tensors really take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omnisieve.backbones import Estimator, adapter_for
from omnisieve.backbones.shape import decoder_shape
from omnisieve.compressors import build_compressor
from omnisieve.config import LlmSection, LoraSection, OffloadSection, RatioSection
from omnisieve.training.build import make_trainable
from omnisieve.training.estimate import Sizes, estimate, processed_tokens, sizes_of, table
from omnisieve.training.objective import TrainingModule
from tests.models import FAMILIES, HIDDEN, tiny_thinker
from tests.training.batches import CLIPS, make_batch
from tests.training.runs import make_config


def make(folder: Path, family: str, mode: Any, checkpointing: bool = False) -> tuple[TrainingModule, Any]:
    lora = LoraSection(rank=2, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    config = make_config(
        folder, dtype="bfloat16", llm=LlmSection(mode, lora=lora), gradient_checkpointing=checkpointing
    )
    backbone = tiny_thinker(dtype=torch.bfloat16, family=family, layers=16)
    make_trainable(adapter_for(backbone), config.train.llm)
    compressor = build_compressor(
        "omnisift", hidden_size=HIDDEN, retained_ratio=0.25, width=4, heads=2, pruner_channels=2
    )
    module = TrainingModule(
        backbone, compressor, estimator=Estimator("masked"), gradient_checkpointing=checkpointing
    ).train()
    return module, config


def saved_bytes(module: TrainingModule, clips: Any) -> int:
    """What a forward leaves for the backward pass, parameters apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return value

    batch = make_batch(module.backbone, clips)
    with module.attached(), torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        module(batch)["loss"].requires_grad_()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(tmp_path: Path, family: str, mode: str, checkpointing: bool):
    module, config = make(tmp_path, family, mode, checkpointing)
    clips = [CLIPS[4], CLIPS[4]]
    need = estimate(config, sizes_of(module, make_batch(module.backbone, clips), config), 1)
    measured = saved_bytes(module, clips)
    assert 0.6 < (need.activations + need.logits) / measured < 1.4


def test_a_drawn_ratio_needs_what_its_highest_needs(tmp_path: Path):
    module, config = make(tmp_path, FAMILIES[0], "frozen")
    batch = make_batch(module.backbone, CLIPS[4:5])
    config.train.estimator.route = "hard_drop"
    fixed = processed_tokens(module, batch, config)
    config.train.ratio = RatioSection(min=0.1, max=0.5)
    drawn = processed_tokens(module, batch, config)
    module.compressor = module.compressor.at(retained_ratio=0.5)
    config.train.ratio = RatioSection()
    assert fixed < drawn == processed_tokens(module, batch, config)


SIZES = Sizes(
    frozen=1000,
    trainable=100,
    element=2,
    decoder=decoder_shape(tiny_thinker().model.language_model.config),
    experts_per_token=0,
    adapter_inputs=0,
    tokens=10,
    answer_tokens=1,
)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(1, 2400, 400, 300), (2, 2400, 100, 300), (3, 600 + 2400, 100, 300)],
)
def test_stages_spread_what_they_say(tmp_path: Path, stage: int, weights: int, gradients: int, optimizer: int):
    need = estimate(make_config(tmp_path, dtype="bfloat16", zero_stage=stage), SIZES, ranks=4)
    assert (need.weights, need.gradients, need.optimizer, need.host) == (weights, gradients, optimizer, 0)


def test_what_is_offloaded_waits_on_the_host(tmp_path: Path):
    config = make_config(tmp_path, dtype="bfloat16", zero_stage=3, offload=OffloadSection(True, True))
    need = estimate(config, SIZES, ranks=4)
    assert (need.weights, need.optimizer, need.host) == (2400, 0, 300 + 100 + 600)


def test_all_of_a_bfloat16_llm_takes_16_bytes_a_parameter(tmp_path: Path):
    config = make_config(tmp_path, dtype="bfloat16", zero_stage=2, llm=LlmSection("full"))
    need = estimate(config, replace(SIZES, frozen=0), ranks=1)
    assert need.weights + need.gradients + need.optimizer == 16 * SIZES.trainable


def test_the_table_says_what_fits(tmp_path: Path):
    config = make_config(tmp_path, dtype="bfloat16", zero_stage=3, llm=LlmSection("full"))
    large = replace(SIZES, frozen=0, trainable=7_600_000_000)
    lines = table(config, large, [1, 64], 80 * 2**30)
    assert "does not fit 80 GiB" in lines[1]
    assert " fits 80 GiB" in lines[2]
