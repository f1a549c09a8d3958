"""Loading a stock backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig

from omnisieve.backbones.adapter import BackboneError
from omnisieve.backbones.families import FAMILIES

Precision = Literal["float32", "bfloat16"]


def load_backbone(
    path: str | Path,
    dtype: Precision = "float32",
    attn_implementation: str = "sdpa",
    device: str | torch.device | None = None,
) -> Any:
    """The stock thinker, frozen and in eval mode.

    Args:
        path: folder or hub name of a thinker, or of a whole model, of which only the thinker is loaded.
        dtype: of the weights. The rotary frequencies stay float32, which casting a loaded model would not do.
        attn_implementation: "sdpa", "eager" or "flash_attention_2".
        device: where to; the CPU when None.

    Raises:
        BackboneError: there is no such model, or it is another one.
    """
    if dtype not in ("float32", "bfloat16"):
        raise BackboneError(f"dtype is {dtype!r}; choose 'float32' or 'bfloat16'")
    try:
        model_type = PretrainedConfig.get_config_dict(str(path))[0].get("model_type")
    except OSError as error:
        raise BackboneError(
            f"{path} is neither a folder with a config.json nor a model that the hub, or its local cache, has: {error}"
        ) from error
    families = {name: family for family in FAMILIES for name in family.model_types}
    if model_type not in families:
        raise BackboneError(f"{path} is a {model_type!r}; supported are {', '.join(families)}")
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}
    model: Any = families[model_type].thinker.from_pretrained(str(path), **options)
    if device is not None:
        model.to(device)
    return model.eval().requires_grad_(False)
