"""What a run leaves for others: its compressor, and what it changed of the LLM, as an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnisieve.artifact import save_compressor
from omnisieve.backbones import Adapter
from omnisieve.backbones.tuning import fingerprint, trainable
from omnisieve.compressors import Compressor, build_compressor
from omnisieve.config import TrainConfig
from omnisieve.trained_llm import TunedLlm
from omnisieve.training.distributed import Ranks
from omnisieve.training.engine import collect
from omnisieve.training.errors import writing
from omnisieve.training.objective import TrainingModule


def export(module: TrainingModule, folder: Path, config: TrainConfig, card: Mapping[str, Any], ranks: Ranks) -> None:
    """Write a folder for `load_compressor`; what it replaces stays until it is whole. All ranks call this.

    Args:
        module: what trains.
        folder: to write.
        config: of the run.
        card: provenance.
        ranks: this process among its peers.

    Raises:
        OutputError: it cannot be written.
    """
    first = ranks.is_first
    weights = state_of(module.compressor, keep=first)
    llm = tuned_llm(module.adapter, config, keep=first)
    if first:
        also = None if llm is None else llm.save
        # Compressors that are made to be written and read back draw numbers, which a resumed run would not.
        with torch.random.fork_rng(devices=[]), writing("the compressor", folder):
            save_compressor(whole(module.compressor, weights), folder, card=card, also=also)
    ranks.barrier()


def state_of(compressor: Compressor, *, keep: bool) -> dict[str, Tensor]:
    """Its whole parameters and this rank's buffers on the host; see `collect`."""
    parameters = collect(dict(compressor.named_parameters()), keep=keep)
    buffers = {name: value for name, value in compressor.state_dict().items() if name not in parameters}
    return {**parameters, **buffers} if keep else {}


def whole(compressor: Compressor, weights: Mapping[str, Tensor]) -> Compressor:
    """A compressor on the host with these weights, in float32: what trains may be spread, or bfloat16."""
    copy = build_compressor(
        compressor.name, hidden_size=getattr(compressor, "hidden_size", None), **asdict(compressor.settings)
    )
    copy.load_state_dict(weights)
    return copy


def tuned_llm(adapter: Adapter, config: TrainConfig, *, keep: bool) -> TunedLlm | None:
    """What a run changed of the LLM; None if that is frozen. All ranks call this.

    Args:
        adapter: of the LLM.
        config: of the run.
        keep: whether this rank wants the tensors.
    """
    llm, base = config.train.llm, config.model.path
    tensors = collect(trainable(adapter), keep=keep)
    if llm.mode == "lora":
        return TunedLlm("lora", base, tensors, llm.lora, fingerprint(adapter))
    return TunedLlm("full", base, tensors) if llm.mode == "full" else None
