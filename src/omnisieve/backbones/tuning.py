"""What of the LLM learns beside a compressor: nothing, low-rank adapters in its layers, or all of it.

The encoders stay frozen in every mode. What learns has names that do not depend on the module tree of a transformers
version: those of the decoder behind `decoder.`, those of the head behind `lm_head.`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from omnisieve.backbones.adapter import Adapter, BackboneError
from omnisieve.backbones.loading import shape_of, whole
from omnisieve.config import LoraSection
from omnisieve.ops.tensors import misfits

_ADAPTER = "default"
# Values of each tensor that enter a fingerprint.
_SAMPLED = 256


def add_lora(adapter: Adapter, lora: LoraSection) -> LoraModel:
    """Put low-rank adapters, in float32 and equal to nothing, beside linear modules of the decoder's layers.

    Args:
        adapter: of a frozen model.
        lora: which modules, which rank.

    Returns:
        peft's handle, for `remove_lora`.

    Raises:
        BackboneError: there are adapters already, or the layers have no linear modules of such names.
    """
    if any(_lora_layers(adapter.decoder)):
        raise BackboneError("the LLM has low-rank adapters already: merge or remove them first")
    handle = LoraModel(adapter.decoder, lora_config(adapter, lora), _ADAPTER)
    _in_float32(adapter.decoder)
    return handle


def lora_config(adapter: Adapter, lora: LoraSection) -> LoraConfig:
    """What peft has to know.

    Raises:
        BackboneError: the layers have no linear modules of such names.
    """
    linear = _linear_modules(adapter.layers)
    if missing := sorted(set(lora.targets) - linear):
        raise BackboneError(
            f"lora.targets: the layers of the LLM have no linear modules {', '.join(missing)}; they have "
            f"{', '.join(sorted(linear))}"
        )
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets), bias="none"
    )


def remove_lora(adapter: Adapter, handle: LoraModel, *, merge: bool) -> None:
    """Take adapters away; with `merge` what they said is part of the weights from now on, rounded to their precision.

    Raises:
        BackboneError: merged weights would not be finite; nothing is taken away then.
    """
    if merge:
        try:
            handle.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise BackboneError(f"adapters cannot be merged into the LLM: {error}") from error
    else:
        handle.unload()
    # Left by some versions of peft, which then warn of a further set of adapters.
    vars(adapter.decoder).pop("peft_config", None)


class LoraVariants:
    """LLMs that differ from one that is loaded by adapters; at most one of them speaks at a time.

    Attributes:
        adapter: of the LLM.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._handle: LoraModel | None = None
        self._learning = [parameter for parameter in adapter.decoder.parameters() if parameter.requires_grad]

    def add(self, lora: LoraSection, tensors: Mapping[str, Tensor]) -> str:
        """Add trained adapters, silent for now.

        Args:
            lora: what they were made with.
            tensors: under the names of `trainable`.

        Returns:
            the name to use them by.

        Raises:
            BackboneError: they do not fit this LLM, or it has adapters of others; `remove` what there is.
        """
        decoder, name = self.adapter.decoder, _ADAPTER
        if self._handle is None:
            self._handle = add_lora(self.adapter, lora)
        else:
            name = f"{_ADAPTER}{len(self._handle.peft_config)}"
            self._handle.peft_config[name] = lora_config(self.adapter, lora)
            self._handle.inject_adapter(decoder, name)
            _in_float32(decoder)
        load_trained(trainable(self.adapter, name), tensors)
        set_dropout(decoder, False)
        self._handle.disable_adapter_layers()
        return name

    @contextmanager
    def speaking(self, name: str | None) -> Iterator[None]:
        """Forwards inside are those of the LLM with these adapters; with none of them if None."""
        if name is None or self._handle is None:
            yield
            return
        self._handle.enable_adapter_layers()
        # Last, because enabling lets adapters learn.
        self._handle.set_adapter(name, inference_mode=True)
        try:
            yield
        finally:
            self._handle.disable_adapter_layers()

    def remove(self) -> None:
        """Leave the LLM as it was before the first of them."""
        if self._handle is not None:
            remove_lora(self.adapter, self._handle, merge=False)
            self._handle = None
        for parameter in self._learning:
            parameter.requires_grad_(True)


def train_all(adapter: Adapter) -> None:
    """Make decoder, embeddings and head learn."""
    adapter.decoder.requires_grad_(True)
    adapter.lm_head.requires_grad_(True)


def trainable(adapter: Adapter, lora: str = _ADAPTER) -> dict[str, nn.Parameter]:
    """What of the LLM learns, by names that all versions share; tied weights once.

    Args:
        adapter: of the model.
        lora: which adapters, where there are some.
    """
    parts = nn.ModuleDict({"decoder": adapter.decoder, "lm_head": adapter.lm_head})
    learning = {name: parameter for name, parameter in parts.named_parameters() if parameter.requires_grad}
    if any(_lora_layers(adapter.decoder)):
        chosen = f".{lora}."
        return {name.replace(chosen, "."): parameter for name, parameter in learning.items() if chosen in name}
    return learning


def load_trained(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Give what learns of an LLM its trained values; all ranks call this where it is spread over them.

    Args:
        parameters: of `trainable`, of a model made trainable in the same way.
        tensors: under the same names.

    Raises:
        BackboneError: a tensor is missing, left over or of another shape; names them.
    """
    problems = misfits(tensors, {name: shape_of(parameter) for name, parameter in parameters.items()})
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise BackboneError(f"the trained weights do not fit this LLM: {'; '.join(problems[:8])}{more}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            with whole(parameter, change=True):
                parameter.copy_(tensors[name])


def fingerprint(adapter: Adapter) -> str:
    """Tells LLMs of equal shapes apart, whatever precision they were loaded in; adapters are no part of it.

    It is made from values of the linear modules of three layers. All ranks call this where the LLM is spread over them.
    """
    digest = hashlib.sha256()
    for place in sorted({0, len(adapter.layers) // 2, len(adapter.layers) - 1}):
        for name, part in sorted(adapter.layers[place].named_modules()):
            # Routers are linear modules in some versions only.
            if name.endswith("_proj") and isinstance(part, nn.Linear | LoraLayer):
                weight: Any = (part.get_base_layer() if isinstance(part, LoraLayer) else part).weight
                with whole(weight):
                    flat = weight.detach().flatten()
                    values = flat[:: max(flat.numel() // _SAMPLED, 1)][:_SAMPLED].to("cpu", torch.bfloat16).contiguous()
                digest.update(f"{place}.{name}".encode() + values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


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


def adapter_width(decoder: nn.Module) -> int:
    """Width of what adapters see, over all layers."""
    return sum(layer.in_features for layer in _lora_layers(decoder))


def _in_float32(decoder: nn.Module) -> None:
    """Adapters learn in float32 also beside a bfloat16 LLM; nothing else of it learns."""
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _linear_modules(layers: nn.Module) -> set[str]:
    """Names of linear modules within a layer, whether adapters stand beside them or not."""
    parts = dict(layers.named_modules())
    within = tuple(f"{name}." for name, part in parts.items() if isinstance(part, LoraLayer))
    linear = (name for name, part in parts.items() if isinstance(part, nn.Linear | LoraLayer))
    return {name.rpartition(".")[2] for name in linear if not name.startswith(within)}


def _lora_layers(decoder: nn.Module) -> Iterator[Any]:
    return (module for module in decoder.modules() if isinstance(module, LoraLayer))
