"""From a configuration to a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from transformers.utils.logging import disable_progress_bar

from omnisieve.artifact import load_compressor
from omnisieve.backbones import Adapter, BackboneError, Estimator, adapter_for, load_backbone
from omnisieve.backbones.loading import shape_of
from omnisieve.backbones.media import media_loader
from omnisieve.backbones.tuning import add_lora, load_trained, train_all, trainable
from omnisieve.compressors import (
    Compressor,
    CompressorError,
    build_compressor,
    compressor_type,
    find_preset,
    list_compressors,
)
from omnisieve.compressors.inner import InnerCompressor
from omnisieve.config import ConfigError, LlmSection, TrainConfig, check_fields
from omnisieve.data.errors import DataError
from omnisieve.trained_llm import describe_tuned_llm, has_tuned_llm, read_tuned_llm
from omnisieve.training.distributed import Ranks
from omnisieve.training.engine import sharded_loading
from omnisieve.training.errors import TrainingError
from omnisieve.training.objective import TrainingModule
from omnisieve.training.streams import open_streams
from omnisieve.training.trainer import Trainer

USER_ERRORS = (ConfigError, BackboneError, CompressorError, DataError, TrainingError)
"""What a user can cure; their messages need no traceback."""


def build_trainer(config: TrainConfig, ranks: Ranks) -> Trainer:
    """Load the LLM, make or load the compressor, open the data.

    Raises:
        ConfigError: the compressor's section does not fit its method.
        BackboneError, CompressorError, DataError: what the configuration names is not there or does not fit. Most of
            it `check_run` says earlier.
    """
    if not ranks.is_first:
        disable_progress_bar()
    ranks.tell(f"loading {config.model.path} in {config.model.dtype}")
    with sharded_loading(config):
        backbone = load_backbone(
            config.model.path,
            config.model.dtype,
            config.model.attn_implementation,
            encoder_attn_implementation=config.model.encoder_attn_implementation,
        )
    adapter = adapter_for(backbone)
    # The same start on every rank.
    torch.manual_seed(config.train.seed)
    compressor = make_compressor(config, adapter.hidden_size)
    make_trainable(adapter, config.train.llm)
    start_llm(adapter, config)
    media = media_loader(config.model.path, adapter, config.data)
    module = TrainingModule(
        backbone,
        compressor,
        estimator=Estimator(config.train.estimator.route, config.train.estimator.candidates),
        gate_clip=config.train.estimator.gate_clip,
        distill_weight=config.train.distill_weight,
        gradient_checkpointing=config.train.gradient_checkpointing,
        teacher=make_teacher(config),
    )
    ranks.tell(describe_model(module))
    streams = open_streams(config.data, config.train, media, compressor, ranks)
    ranks.tell(
        f"starting DeepSpeed with ZeRO-{config.train.zero_stage} on {ranks.world_size} rank(s); a step is "
        f"{config.train.micro_batch_size * config.train.gradient_accumulation_steps * ranks.world_size} clips, the "
        "first one takes longer"
    )
    trainer = Trainer(config, module, streams, ranks)
    # From here on ranks draw apart: what an adapter drops on one must not be what it drops on all.
    torch.manual_seed(config.train.seed + 1 + ranks.rank)
    return trainer


def describe_model(module: TrainingModule) -> str:
    """What was loaded and how much of it learns, in a line."""
    sizes = [(shape_of(p).numel(), p.requires_grad) for p in module.parameters()]
    learning = sum(size for size, learns in sizes if learns)
    return (
        f"{type(module.backbone).__name__}: {sum(size for size, _ in sizes) / 1e9:.3g} billion parameters, of which "
        f"{learning / 1e6:.3g} million learn, with {module.compressor.name}"
    )


def make_trainable(adapter: Adapter, llm: LlmSection) -> None:
    """Let of the LLM learn what the configuration says.

    Raises:
        BackboneError: adapters are wanted where it has no modules of those names.
    """
    if llm.mode == "lora":
        add_lora(adapter, llm.lora)
    elif llm.mode == "full":
        train_all(adapter)


def start_llm(adapter: Adapter, config: TrainConfig) -> None:
    """Let the LLM go on from where the export in `train.init_from` ended, if that holds one.

    Args:
        adapter: of the model, made trainable.
        config: of the run.

    Raises:
        ArtifactError: it is damaged. BackboneError: it was made from another LLM.
    """
    start = config.train.init_from
    if start is not None and not is_method(start) and has_tuned_llm(start):
        tuned = read_tuned_llm(start)
        load_trained(trainable(adapter), tuned.tensors)
        tuned.check(adapter)


def check_llm(start: str, llm: LlmSection) -> None:
    """Whether a run can go on with the LLM of an export.

    Raises:
        ConfigError: it was trained in another way; says what to set.
    """
    if not has_tuned_llm(start):
        return
    found = describe_tuned_llm(start)
    if found["mode"] != llm.mode:
        raise ConfigError(
            f"train.init_from: the LLM of {start} was trained, too (train.llm.mode={found['mode']}), here "
            f"train.llm.mode is {llm.mode}: set {found['mode']} to go on with both; or write that LLM as a model with "
            f"`tools/export.py {start} OUT --merge`, and set train.init_from=OUT model.path=OUT/model"
        )
    if found["lora"] is None:
        return
    # Dropout is no part of what was learned.
    for name in ("rank", "alpha", "targets"):
        wanted, there = (getattr(lora, name) for lora in (llm.lora, found["lora"]))
        if wanted != there and not (name == "targets" and set(wanted) == set(there)):
            raise ConfigError(
                f"train.llm.lora.{name} is {wanted}, in {start} it is {there}: adapters go on as they are"
            )


def make_compressor(config: TrainConfig, hidden_size: int) -> Compressor:
    """The compressor to train: fresh, with a base, or exported, whose settings the section may change.

    Raises:
        ConfigError: the method has nothing to train, the section does not fit it, another one was exported, or with
            an LLM that was trained in another way.
        CompressorError: a value cannot be, or `train.init_from` names no method; names the nearest.
    """
    section = dict(config.compressor)
    method = compressor_type(section.pop("method"))
    if not method.learned:
        raise ConfigError(f"compressor.method: {method.name} has no parameters to train")
    if "preset" in section:
        section = find_preset(section.pop("preset")).of(method.name, section)
    hints = get_type_hints(method.settings_type)
    allowed = {field.name: hints[field.name] for field in fields(method.settings_type)}
    settings = check_fields(section, allowed, f"compressor ({method.name})")
    split = [name for name in ("video_ratio", "audio_ratio") if settings.get(name) is not None]
    if config.train.ratio.min is not None and split:
        raise ConfigError(
            f"compressor.{split[0]} and train.ratio exclude each other: a drawn ratio holds for both modalities"
        )
    start = config.train.init_from
    if start is None or is_method(start):
        base = None if make_teacher(config) is not None else start
        return build_compressor(method.name, hidden_size=hidden_size, **with_base(settings, base))
    # An imported one may be bfloat16, in which most updates of a small learning rate would be rounded away.
    compressor = load_compressor(start, **settings).float()
    if compressor.name != method.name:
        raise ConfigError(f"train.init_from: {start} holds {compressor.name}, compressor.method is {method.name}")
    if compressor.hidden_size != hidden_size:
        raise ConfigError(
            f"train.init_from: {start} is for hidden size {compressor.hidden_size}, but {config.model.path} has "
            f"{hidden_size}"
        )
    check_llm(start, config.train.llm)
    return compressor


def is_method(start: str) -> bool:
    """Whether `train.init_from` names a registered method. A folder of the same name is written ./NAME.

    Raises:
        CompressorError: it is neither a method nor a folder; names the nearest method.
    """
    if start in list_compressors():
        return True
    if "/" in start or Path(start).is_dir():
        return False
    try:
        compressor_type(start)
    except CompressorError as error:
        raise CompressorError(f"train.init_from: {error} (and there is no folder {start})") from error
    return True


def make_teacher(config: TrainConfig) -> InnerCompressor | None:
    """The method inside the LLM whose order a warm start teaches.

    Raises:
        ConfigError: `train.init_from` names one without steps to teach it, or there are steps, but no such method.
        CompressorError: a value cannot be.
    """
    start, warm = config.train.init_from, config.train.warm_start
    if start is None or not is_method(start) or not issubclass(compressor_type(start), InnerCompressor):
        if warm.steps:
            raise ConfigError(
                "train.warm_start.steps teach the order of a method inside the LLM: name it in train.init_from, for "
                "example seats (a method before the LLM needs no steps), or set them to 0"
            )
        return None
    if not warm.steps:
        raise ConfigError(
            f"train.init_from: {start} decides inside the LLM, where a compressor cannot follow; its order can be "
            "taught: set train.warm_start.steps, to 100 for example"
        )
    # Where it scores does not depend on the ratio.
    teacher = build_compressor(start, **{"retained_ratio": 0.5, **warm.settings})
    assert isinstance(teacher, InnerCompressor)  # its class is one
    return teacher


def with_base(settings: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    """The settings of a learned method that starts as `base`.

    Raises:
        ConfigError: they name another.
    """
    if base is None:
        return dict(settings)
    if settings.get("base") not in (None, base):
        raise ConfigError(f"train.init_from is {base}, compressor.base {settings['base']}: leave one out")
    return {**settings, "base": base}
