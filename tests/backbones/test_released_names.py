"""Released checkpoints hold whole models, under names older than the classes that load them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2_5OmniConfig, Qwen3OmniMoeConfig

from omnisieve.backbones import load_backbone
from tests.models import FAMILIES, QWEN3, SILENT, SOUNDING, family_of, tiny_config, tiny_inputs, tiny_thinker

RENAMED = {"model.audio_tower.": "audio_tower.", "model.visual.": "visual.", "model.language_model.": "model."}


def released(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A thinker's weights as a release names them, with the projections of each expert apart."""
    for name, value in model.state_dict().items():
        for new, old in RENAMED.items():
            name = f"thinker.{old}{name.removeprefix(new)}" if name.startswith(new) else name
        name = name if name.startswith("thinker.") else f"thinker.{name}"
        if ".experts." not in name:
            yield name, value.clone()
            continue
        stem, projection = name.split(".experts.")
        parts = {"down_proj": ("down_proj",), "gate_up_proj": ("gate_proj", "up_proj")}[projection]
        for expert, weights in enumerate(value):
            for part, weight in zip(parts, weights.chunk(len(parts)), strict=True):
                yield f"{stem}.experts.{expert}.{part}.weight", weight.clone()


def save_released(model: nn.Module, folder: Path) -> Path:
    """A thinker in the folder of a whole model."""
    family = family_of(model)
    whole = Qwen3OmniMoeConfig if family == QWEN3 else Qwen2_5OmniConfig
    whole(thinker_config=tiny_config(family=family).to_dict(), enable_audio_output=False).save_pretrained(folder)
    save_file(dict(released(model)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_released_checkpoint_is_loaded(family: str, tmp_path: Path):
    model = tiny_thinker(family=family)
    save_released(model, tmp_path)
    inputs = tiny_inputs(model, [[SOUNDING], [SILENT]])
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path)(**inputs).logits, model(**inputs).logits)
