"""Released checkpoints hold whole models, under names older than the classes that load them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2_5OmniConfig, Qwen3OmniMoeConfig

from omnisieve.backbones import load_backbone
from tests.models import FAMILIES, QWEN3, SILENT, SOUNDING, family_of, tiny_config, tiny_inputs, tiny_thinker
from tests.published_layout import named_as_released


def save_released(model: nn.Module, folder: Path) -> Path:
    """A thinker in the folder of a whole model."""
    family = family_of(model)
    whole = Qwen3OmniMoeConfig if family == QWEN3 else Qwen2_5OmniConfig
    whole(thinker_config=tiny_config(family=family).to_dict(), enable_audio_output=False).save_pretrained(folder)
    save_file(dict(named_as_released(model)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_released_checkpoint_is_loaded(family: str, tmp_path: Path):
    model = tiny_thinker(family=family)
    save_released(model, tmp_path)
    inputs = tiny_inputs(model, [[SOUNDING], [SILENT]])
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path)(**inputs).logits, model(**inputs).logits)
