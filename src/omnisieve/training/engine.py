"""The DeepSpeed engine of a run: optimiser, schedule and sharding."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from omnisieve.backbones.loading import loading_in_shards, shape_of, whole
from omnisieve.config import TrainConfig, TrainSection
from omnisieve.training.deepspeed_settings import deepspeed_config, trains_in_bfloat16
from omnisieve.training.objective import TrainingModule
from omnisieve.training.schedule import warmup_cosine


def build_engine(module: TrainingModule, config: TrainConfig) -> Any:
    """Wrap a module for training."""
    train = config.train
    if trains_in_bfloat16(config):
        # Here and not by DeepSpeed, which leaves it as it is beside an LLM that was loaded in shards.
        module.compressor.to(torch.bfloat16)
    # It reads weights of its output layer without calling that layer: ZeRO-3 has to fetch them with its own.
    set_z3_leaf_modules(module.compressor, [nn.MultiheadAttention], raise_if_not_found=False)
    optimizer = AdamW(parameter_groups(module, train))
    warmup = round(train.warmup_ratio * train.max_steps)

    def factor(step: int) -> float:
        return warmup_cosine(step, total=train.max_steps, warmup=warmup, floor=train.min_lr_ratio)

    def scheduler(optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, factor)

    trainable = sum(shape_of(p).numel() for group in optimizer.param_groups for p in group["params"])
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, lr_scheduler=scheduler, config=deepspeed_config(config, trainable)
    )
    return engine


def sharded_loading(config: TrainConfig) -> AbstractContextManager[None]:
    """A context for loading the LLM of a run: under ZeRO-3 no rank ever holds it whole."""
    if config.train.zero_stage < 3:
        return nullcontext()
    # The precision is that of the LLM here, whatever the trainables' is.
    return loading_in_shards(deepspeed_config(config) | {"bf16": {"enabled": config.model.dtype == "bfloat16"}})


def parameter_groups(module: TrainingModule, train: TrainSection) -> list[dict[str, Any]]:
    """Trainables by owner, each with its own learning rate; weight decay on matrices only."""
    owners: list[tuple[str, nn.Module, float]] = [
        ("compressor", module.compressor, train.lr),
        ("llm", module.backbone, train.llm.lr),
    ]
    groups = []
    for owner, part, lr in owners:
        trainable = [p for p in part.parameters() if p.requires_grad]
        for matrices in (True, False):
            chosen = [p for p in trainable if (len(shape_of(p)) > 1) == matrices]
            decay = train.weight_decay if matrices else 0.0
            if chosen:
                groups.append({"params": chosen, "lr": lr, "weight_decay": decay, "owner": owner})
    return groups


def learning_rates(engine: Any) -> dict[str, float]:
    """Current learning rate of each owner."""
    return {group["owner"]: group["lr"] for group in engine.optimizer.param_groups}


def collect(parameters: Mapping[str, nn.Parameter], *, keep: bool) -> dict[str, Tensor]:
    """Copies of whole parameters on the host, whatever the ZeRO stage; one at a time, so that memory stays flat.

    Args:
        parameters: by name; all ranks call this.
        keep: whether this rank wants them; the others get none.
    """
    copies = {}
    for name, parameter in parameters.items():
        with whole(parameter):
            if keep:
                copies[name] = parameter.detach().to("cpu", copy=True)
    return copies
