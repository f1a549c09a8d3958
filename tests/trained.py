"""Tiny thinkers that were tuned beside a compressor, and their exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from omnisieve.artifact import save_compressor
from omnisieve.backbones import adapter_for
from omnisieve.backbones.tuning import fingerprint, trainable
from omnisieve.compressors import build_compressor
from omnisieve.config import LlmSection, LoraSection
from omnisieve.trained_llm import TunedLlm
from omnisieve.training.build import make_trainable
from tests.models import HIDDEN, QWEN2_5, tiny_thinker

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def lora_section(**fields: Any) -> LoraSection:
    """Adapters of rank 4 in the attention, which both families have."""
    return LoraSection(**{"rank": 4, "alpha": 8.0, "targets": ATTENTION} | fields)


def tune(
    model: nn.Module, mode: Literal["lora", "full"], seed: int = 1, lora: LoraSection | None = None
) -> dict[str, Tensor]:
    """Change what of a model learns, as a training would, and return copies of it."""
    adapter = adapter_for(model)
    make_trainable(adapter, LlmSection(mode, lora=lora or lora_section()))
    generator = torch.Generator().manual_seed(seed)
    learning = trainable(adapter)
    with torch.no_grad():
        for parameter in learning.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return {name: parameter.detach().clone() for name, parameter in learning.items()}


def export_tuned(
    folder: Path,
    mode: Literal["lora", "full"] = "lora",
    *,
    family: str = QWEN2_5,
    seed: int = 1,
    lora: LoraSection | None = None,
    base: str | Path = "tiny",
    model: nn.Module | None = None,
    hidden_size: int = HIDDEN,
) -> tuple[Path, nn.Module]:
    """An export of a compressor and a tuned LLM, and the model that the training ended with."""
    model = tiny_thinker(family=family) if model is None else model
    section = None if mode == "full" else lora or lora_section()
    tensors = tune(model, mode, seed, section)
    tuned = TunedLlm(mode, str(base), tensors, section, fingerprint(adapter_for(model)) if section else None)
    compressor = build_compressor(
        "omnisift", hidden_size=hidden_size, retained_ratio=0.25, width=16, heads=2, pruner_channels=8
    )
    save_compressor(compressor, folder, card={"backbone": str(base)}, also=tuned.save)
    return folder, model.eval().requires_grad_(False)
