"""Loading a stock backbone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from omnisieve.backbones.adapter import BackboneError, adapter_for
from omnisieve.backbones.families import (
    FAMILIES,
    RELEASED_END_TOKENS,
    RELEASED_PAD_TOKEN,
    Family,
    family_of,
    uses_released_tokens,
)
from omnisieve.backbones.tower_attention import batch_tower_attention

Precision = Literal["float32", "bfloat16", "auto"]
BATCHED = "batched_sdpa"


@contextmanager
def loading_in_shards(settings: dict[str, Any]) -> Iterator[None]:
    """Models loaded inside are spread over the ranks while they are read, as DeepSpeed's ZeRO-3 wants them.

    Args:
        settings: DeepSpeed's configuration.
    """
    marker = HfDeepSpeedConfig(settings)  # transformers looks whether there is one
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del marker


def whole(parameter: nn.Parameter, *, change: bool = False) -> AbstractContextManager[Any]:
    """A context in which a parameter that is spread over the ranks is whole; all ranks enter it together.

    Args:
        parameter: of any model; one that is not spread is whole anyway.
        change: what the first rank writes inside is kept, by all ranks.
    """
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed  # slow, and needed by a training alone

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if change else None)


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The whole one's, also of a parameter that is spread over the ranks."""
    return getattr(parameter, "ds_shape", parameter.shape)


def load_backbone(
    path: str | Path,
    dtype: Precision = "float32",
    attn_implementation: str = "sdpa",
    device: str | torch.device | None = None,
    encoder_attn_implementation: str = BATCHED,
) -> Any:
    """The stock thinker, frozen and in eval mode.

    A model with the released vocabulary ends its answers at the released end tokens, whatever its files say: of a
    whole model's folder transformers reads an empty generation config for the thinker, which would never end.

    Args:
        path: folder or hub name of a thinker, or of a whole model, of which only the thinker is loaded.
        dtype: of the weights; "auto" is that in which they are stored. The rotary frequencies stay float32, which
            casting a loaded model would not do.
        attn_implementation: of the decoder; "sdpa", "eager" or "flash_attention_2".
        device: where to; the CPU when None.
        encoder_attn_implementation: of the towers; the same, or "batched_sdpa" (see `backbones.tower_attention`).

    Raises:
        BackboneError: there is no such model, it is another one or lacks weights, or the package of its attention is
            missing.
    """
    if dtype not in ("float32", "bfloat16", "auto"):
        raise BackboneError(f"dtype is {dtype!r}; choose 'float32', 'bfloat16' or 'auto'")
    family = find_model(path)
    batched = encoder_attn_implementation == BATCHED
    encoders = "sdpa" if batched else encoder_attn_implementation
    attention = dict.fromkeys(("", "text_config"), attn_implementation)
    attention |= dict.fromkeys(("vision_config", "audio_config"), encoders)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    model: Any
    try:
        with without_token_warnings():
            model, found_weights = family.thinker.from_pretrained(str(path), output_loading_info=True, **options)
    except ImportError as error:
        chosen = {"attn_implementation": attn_implementation, "encoder_attn_implementation": encoders}
        wrong = " and ".join(f"{key} {name!r}" for key, name in chosen.items() if name not in ("sdpa", "eager"))
        if not wrong:
            raise BackboneError(f"{path} cannot be loaded: {error}") from error
        raise BackboneError(f"{wrong} cannot be used: {error} Install it, or choose 'sdpa'") from error
    if missing := sorted(found_weights["missing_keys"]):
        # Only warned of by transformers, which makes them up.
        raise BackboneError(f"{path} lacks {len(missing)} weights, {missing[0]} for one: download it again")
    if uses_released_tokens(model.config):
        model.generation_config.eos_token_id = list(RELEASED_END_TOKENS)
        model.generation_config.pad_token_id = RELEASED_PAD_TOKEN
    if batched:
        batch_tower_attention(adapter_for(model))
    if device is not None:
        model.to(device)
    return model.eval().requires_grad_(False)


@contextmanager
def without_token_warnings() -> Iterator[None]:
    """Inside, transformers does not compare the text tokens of a whole model with the codes that its talker speaks.

    It would warn of every token id that the talker's own small vocabulary does not have.
    """
    logger = logging.getLogger("transformers.configuration_utils")

    def drop(record: logging.LogRecord) -> bool:
        return "within the vocabulary" not in record.getMessage()

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


def find_model(path: str | Path) -> Family:
    """The family of a model, by its config.json.

    Raises:
        BackboneError: there is no such model, or it is another one.
    """
    found = Path(path).is_dir()
    if (found or _is_path(path)) and not (Path(path) / "config.json").is_file():
        reason = "has no config.json" if found else "is no folder that exists"
        raise BackboneError(f"{path} {reason}; give the folder of a model, or its name on the hub")
    try:
        model_type = PretrainedConfig.get_config_dict(str(path))[0].get("model_type")
    except OSError as error:
        raise BackboneError(
            f"{path} is neither a folder nor a model that the hub, or its local cache, has: {error}"
        ) from error
    family = family_of(model_type)
    if family is None:
        known = ", ".join(name for family in FAMILIES for name in family.model_types)
        raise BackboneError(f"{path} is a {model_type!r}; supported are {known}")
    return family


def config_of(path: str | Path) -> Any:
    """The thinker's config of a model: known long before the model is loaded.

    Raises:
        BackboneError: see `find_model`.
    """
    return find_model(path).thinker.config_class.from_pretrained(str(path))


def hidden_size_of(path: str | Path) -> int:
    """D of a model's embeddings; see `config_of`."""
    return config_of(path).text_config.hidden_size


def _is_path(path: str | Path) -> bool:
    """Whether a folder is meant: asking the hub for a misspelt one takes half a minute of retries.

    A name on the hub is NAME or OWNER/NAME; the latter is taken for a path if there is a folder OWNER here.
    """
    owner, *rest = str(path).split("/")
    return owner[:1] in ("", ".", "~") or len(rest) > 1 or (bool(rest) and Path(owner).is_dir())
