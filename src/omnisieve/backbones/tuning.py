"""What of the LLM learns beside a compressor: nothing, low-rank adapters in its layers, or all of it.

The encoders stay frozen in every mode. What learns has names that do not depend on the module tree of a transformers
version: those of the decoder behind `decoder.`, those of the head behind `lm_head.`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from omnisieve.backbones.adapter import Adapter, BackboneError
from omnisieve.config import LoraSection

_ADAPTER = "default"


def add_lora(adapter: Adapter, lora: LoraSection) -> LoraModel:
    """Put low-rank adapters, in float32 and equal to nothing, beside linear modules of the decoder's layers.

    Args:
        adapter: of a frozen model.
        lora: which modules, which rank.

    Returns:
        peft's handle: `merge_and_unload` adds them to the weights, `unload` takes them away.

    Raises:
        BackboneError: no module of the decoder has such a name, or it is not linear.
    """
    if any(isinstance(module, LoraLayer) for module in adapter.decoder.modules()):
        raise BackboneError("the LLM has low-rank adapters already: merge or unload them first")
    linear = {name.rpartition(".")[2] for name, part in adapter.layers.named_modules() if isinstance(part, nn.Linear)}
    if missing := sorted(set(lora.targets) - linear):
        raise BackboneError(
            f"lora.targets: the layers of the LLM have no linear modules {', '.join(missing)}; they have "
            f"{', '.join(sorted(linear))}"
        )
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets), bias="none"
    )
    handle = LoraModel(adapter.decoder, config, _ADAPTER)
    for name, parameter in adapter.decoder.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return handle


def train_all(adapter: Adapter) -> None:
    """Make decoder, embeddings and head learn."""
    adapter.decoder.requires_grad_(True)
    adapter.lm_head.requires_grad_(True)


def trainable(adapter: Adapter) -> dict[str, nn.Parameter]:
    """What of the LLM learns, by names that all versions share; tied weights once."""
    parts = nn.ModuleDict({"decoder": adapter.decoder, "lm_head": adapter.lm_head})
    return {name: parameter for name, parameter in parts.named_parameters() if parameter.requires_grad}


def load_trained(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Give what learns of the LLM its trained values.

    Args:
        adapter: of a model made trainable in the same way.
        tensors: under the names of `trainable`.

    Raises:
        BackboneError: a tensor is missing, left over or of another shape; names them.
    """
    parameters = trainable(adapter)
    problems = [f"missing: {name}" for name in parameters if name not in tensors]
    problems += [f"left over: {name}" for name in tensors if name not in parameters]
    problems += [
        f"shape of {name}: {tuple(tensors[name].shape)} instead of {tuple(parameters[name].shape)}"
        for name in parameters
        if name in tensors and tensors[name].shape != parameters[name].shape
    ]
    if problems:
        raise BackboneError(f"the trained weights do not fit this LLM: {'; '.join(problems[:8])}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def set_dropout(decoder: nn.Module, active: bool) -> None:
    """Switch the dropout of adapters, and of nothing else."""
    for module in _lora_layers(decoder):
        module.lora_dropout.train(active)


@contextmanager
def without_lora(decoder: nn.Module) -> Iterator[None]:
    """Forwards inside are those of the LLM as it was loaded."""
    layers = list(_lora_layers(decoder))
    # Switching adapters off by peft's own switch would also freeze them, under DeepSpeed's feet.
    for layer in layers:
        layer.set_scale(_ADAPTER, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(_ADAPTER, 1.0)


def _lora_layers(decoder: nn.Module) -> Iterator[Any]:
    return (module for module in decoder.modules() if isinstance(module, LoraLayer))
