"""What DeepSpeed is told of a run: our part follows from the configuration; `train.deepspeed` may set the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from omnisieve.config import ConfigError, TrainConfig

LARGEST_BUCKET = 500_000_000
"""Elements of DeepSpeed's own buckets, which suit a model that trains as a whole."""
_ALIGNMENT = 1024
_ZERO = "zero_optimization"
_OWNED = {
    "train_batch_size": "train.micro_batch_size and train.gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.lr, train.llm.lr and train.weight_decay",
    "scheduler": "train.warmup_ratio and train.min_lr_ratio",
    "bf16": "model.dtype and train.llm.mode",
    "fp16": "model.dtype and train.llm.mode",
    "amp": "model.dtype and train.llm.mode",
    "torch_autocast": "model.dtype and train.llm.mode",
    "activation_checkpointing": "train.gradient_checkpointing",
    f"{_ZERO}.stage": "train.zero_stage",
    f"{_ZERO}.offload_optimizer.device": "train.offload.optimizer",
    f"{_ZERO}.offload_param.device": "train.offload.parameters",
    "tensorboard": "output_dir, which holds TensorBoard's events anyway",
    f"{_ZERO}.cpu_offload": "train.offload.optimizer",
    f"{_ZERO}.cpu_offload_param": "train.offload.parameters",
}
"""Settings that follow from keys of ours, and those keys."""
_PASSED_ON = (
    _ZERO, "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "comms_logger",
    "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state", "aio", "wandb", "csv_monitor",
)  # fmt: skip


def deepspeed_config(config: TrainConfig, trainable: int | None = None) -> dict[str, Any]:
    """DeepSpeed's configuration.

    A frozen LLM, also one with adapters, needs no precision section: it keeps the dtype it was loaded in, and
    trainables are float32. With the section every parameter is bfloat16, and the optimiser holds float32 copies.

    Args:
        config: of the run.
        trainable: parameters that learn, which bound the buckets of gradients; None where no gradient is reduced.
    """
    train = config.train
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if trainable is not None:
        # DeepSpeed allocates a bucket of this size whatever there is to reduce: 2 GB for a compressor's 20 MB.
        zero["reduce_bucket_size"] = zero["allgather_bucket_size"] = bucket_elements(trainable)
    if train.offload.optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload.parameters:
        zero["offload_param"] = {"device": "cpu"}
    own = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": trains_in_bfloat16(config)},
        _ZERO: zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    return _merge(own, train.deepspeed)


def bucket_elements(trainable: int, given: Mapping[str, Any] | None = None) -> int:
    """Elements of the buckets that gradients are reduced in.

    Args:
        trainable: parameters that learn; DeepSpeed wants their number aligned.
        given: `train.deepspeed`, which may set another size.
    """
    zero = (given or {}).get(_ZERO, {})
    if "reduce_bucket_size" in zero:
        return int(zero["reduce_bucket_size"])
    aligned = -(-max(trainable, 1) // _ALIGNMENT) * _ALIGNMENT
    return min(aligned, LARGEST_BUCKET)


def trains_in_bfloat16(config: TrainConfig) -> bool:
    """Whether trainables themselves are bfloat16."""
    return config.train.llm.mode == "full" and config.model.dtype == "bfloat16"


def check_deepspeed(config: TrainConfig) -> None:
    """Refuse what `train.deepspeed` of a run cannot hold.

    Raises:
        ConfigError: a setting that a key of ours decides, names that key; or one that DeepSpeed does not have.
    """
    settings = config.train.deepspeed
    for name in settings:
        if name not in _PASSED_ON and name not in _OWNED:
            near = get_close_matches(name, [*_PASSED_ON, *_OWNED], 1, 0.0)[0]
            raise ConfigError(
                f"train.deepspeed has no setting {name!r}; the nearest is {near!r} (passed on are "
                f"{', '.join(_PASSED_ON)})"
            )
    for name, value in _dotted(settings):
        owner = next((owned for owned in _OWNED if name == owned or name.startswith(f"{owned}.")), None)
        if owner is not None:
            raise ConfigError(f"train.deepspeed.{name} cannot be set here; use {_OWNED[owner]}")
        if value == "auto":
            raise ConfigError(
                f"train.deepspeed.{name} is auto, which only transformers' own trainer fills in: leave it out"
            )
    for name in (_ZERO, f"{_ZERO}.offload_optimizer", f"{_ZERO}.offload_param"):
        section = _section(settings, name)
        if not isinstance(section, Mapping):
            raise ConfigError(f"train.deepspeed.{name} is {section!r}; expected settings, as {{pin_memory: true}}")
    _check_zero(deepspeed_config(config)[_ZERO])


def _check_zero(zero: Mapping[str, Any]) -> None:
    """Let DeepSpeed look at the section that it will get."""
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise ConfigError(f"train.deepspeed.{_ZERO}: {first['msg']} (DeepSpeed)") from error
        name = str(first["loc"][0])
        closest = get_close_matches(name, DeepSpeedZeroConfig.model_fields, 1, 0.0)
        raise ConfigError(
            f"train.deepspeed.{_ZERO}.{name}: {first['msg']} (DeepSpeed); the nearest setting is {closest[0]!r}"
        ) from error


def _section(settings: Mapping[str, Any], name: str) -> Any:
    """What stands under a dotted name; nothing where there is no such section."""
    for part in name.split("."):
        settings = settings.get(part, {}) if isinstance(settings, Mapping) else {}
    return settings


def _dotted(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _merge(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Both, and of what both have, what was given."""
    merged = {**own, **given}
    for name in own.keys() & given.keys():
        if isinstance(own[name], Mapping) and isinstance(given[name], Mapping):
            merged[name] = _merge(own[name], given[name])
    return merged
