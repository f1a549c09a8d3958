"""The DeepSpeed engine of a run: optimiser, schedule and sharding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from omnisieve.config import TrainSection
from omnisieve.training.objective import TrainingModule
from omnisieve.training.schedule import warmup_cosine


def build_engine(module: TrainingModule, train: TrainSection) -> Any:
    """Wrap a module for training.

    There is no precision section: the LLM keeps the dtype it was loaded in, and trainables are float32.
    """
    optimizer = AdamW(parameter_groups(module, train))
    warmup = round(train.warmup_ratio * train.max_steps)

    def factor(step: int) -> float:
        return warmup_cosine(step, total=train.max_steps, warmup=warmup, floor=train.min_lr_ratio)

    def scheduler(optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, factor)

    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, lr_scheduler=scheduler, config=deepspeed_config(train)
    )
    return engine


def deepspeed_config(train: TrainSection) -> dict[str, Any]:
    """What DeepSpeed has to know of a run."""
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {"stage": train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def parameter_groups(module: TrainingModule, train: TrainSection) -> list[dict[str, Any]]:
    """Trainables by owner, each with its own learning rate; weight decay on matrices only."""
    owners: list[tuple[str, nn.Module, float]] = [("compressor", module.compressor, train.lr)]
    groups = []
    for owner, part, lr in owners:
        trainable = [p for p in part.parameters() if p.requires_grad]
        for matrices in (True, False):
            chosen = [p for p in trainable if (p.dim() > 1) == matrices]
            decay = train.weight_decay if matrices else 0.0
            if chosen:
                groups.append({"params": chosen, "lr": lr, "weight_decay": decay, "owner": owner})
    return groups


def learning_rates(engine: Any) -> dict[str, float]:
    """Current learning rate of each owner."""
    return {group["owner"]: group["lr"] for group in engine.optimizer.param_groups}


def gathered(engine: Any, parameters: Iterator[nn.Parameter]) -> AbstractContextManager[Any]:
    """A context in which all ranks see whole parameters, whatever the ZeRO stage."""
    if engine.zero_optimization_stage() < 3:
        return nullcontext()
    return deepspeed.zero.GatheredParameters(list(parameters))
