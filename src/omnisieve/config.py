"""Configuration of training and evaluation runs: one YAML file, dotted overrides, no silent mistakes.

The dataclasses are the schema, the defaults and the help text at once. A key that does not exist, a value of the
wrong type and a missing value are errors that name the file, the key and the cure.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, cast, get_args, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A configuration cannot be used; the message says where, which key, and how to cure it."""


def option(default: Any, text: str) -> Any:
    """Declare a configuration key: its default (`MISSING`: must be given) and what it does or costs."""
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


def section(kind: type) -> Any:
    """Declare a group of keys."""
    return field(default_factory=kind)


@dataclass
class ModelSection:
    """The LLM, frozen, as a stock transformers checkpoint."""

    path: str = option(MISSING, "local folder or hub name of the checkpoint")
    dtype: Literal["bfloat16", "float16", "float32"] = option(
        "bfloat16", "of the frozen LLM; bfloat16 halves memory, but is slower than float32 on most CPUs"
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = option(
        "sdpa", "eager materialises S x S attention; flash_attention_2 needs the flash-attn package"
    )


@dataclass
class AudioSection:
    """The sound of a sample."""

    max_seconds: float = option(300.0, "longer sound is cut, with one warning that counts it; 25 tokens a second")


@dataclass
class MediaSection:
    """How media files become encoder inputs. Visual tokens grow with fps, max_frames and max_pixels."""

    fps: float = option(2.0, "frames per second read from a video; 2 frames make one grid of tokens")
    max_frames: int = option(256, "longer videos are sampled more thinly over their whole length")
    min_pixels: int = option(4 * 28 * 28, "smaller frames are enlarged to this; one token is 28 x 28 pixels")
    max_pixels: int = option(320 * 28 * 28, "larger frames are reduced to this: at most 320 tokens per grid")
    audio: AudioSection = section(AudioSection)
    decode_seconds: float = option(60.0, "a file that takes longer to decode counts as broken")
    workers: int = option(2, "decoding processes per rank; raise it while the log shows data wait")
    feature_cache: str | None = option(
        None, "folder of tools/cache_features.py; saves decoding and encoders, takes about 100 MB per minute of video"
    )

    def __post_init__(self) -> None:
        _positive("data", self, "fps", "max_frames", "min_pixels", "max_pixels", "decode_seconds")
        _positive("data.audio", self.audio, "max_seconds")
        _not_negative("data", self, "workers")
        if self.min_pixels > self.max_pixels:
            raise ConfigError(f"data.min_pixels {self.min_pixels} is above data.max_pixels {self.max_pixels}")


@dataclass
class DataSection(MediaSection):
    """Training data: manifests in messages form, and how their media are read."""

    train: str = option(MISSING, "JSONL manifest; media paths in it are relative to its folder")
    val: str | None = option(None, "JSONL manifest for validation; null: no validation, the last step is the result")


@dataclass
class EstimatorSection:
    """How the loss teaches a selection that is not differentiable."""

    route: Literal["masked", "hard_drop"] = option(
        "masked", "hard_drop removes dropped tokens: cheapest, but teaches kept ones only; masked teaches both"
    )
    candidates: float = option(
        1.0, "masked: share of the dropped tokens that stay in the sequence; 1 teaches most, 0.5 costs about half"
    )

    def __post_init__(self) -> None:
        _in_unit_interval("train.estimator", self, "candidates")


@dataclass
class RatioSection:
    """Elastic ratio: every step draws its retained ratio from [min, max]; both null keep the compressor's own."""

    min: float | None = option(None, "lowest retained ratio")
    max: float | None = option(None, "highest retained ratio; the exported compressor serves the whole range")

    def __post_init__(self) -> None:
        if (self.min is None) != (self.max is None):
            raise ConfigError("train.ratio needs both min and max, or neither")
        if self.min is not None and self.max is not None and not 0 < self.min <= self.max <= 1:
            raise ConfigError(f"train.ratio is [{self.min}, {self.max}]; it must satisfy 0 < min <= max <= 1")


@dataclass
class TrainSection:
    """The optimisation. One step sees micro_batch_size * gradient_accumulation_steps * ranks clips."""

    max_steps: int = option(MISSING, "optimiser steps")
    micro_batch_size: int = option(1, "clips per rank and forward; memory grows with it")
    gradient_accumulation_steps: int = option(1, "forwards per step; same result as a larger batch, takes longer")
    lr: float = option(2e-4, "peak learning rate of the compressor")
    weight_decay: float = option(0.0, "AdamW, on matrices only")
    warmup_ratio: float = option(0.05, "share of the steps with rising learning rate")
    min_lr_ratio: float = option(0.1, "the cosine ends at this share of lr")
    max_grad_norm: float = option(1.0, "clipping of the global norm")
    estimator: EstimatorSection = section(EstimatorSection)
    ratio: RatioSection = section(RatioSection)
    distill_weight: float = option(
        0.0, "weight of the KL to the same LLM with all tokens; above 0 adds a full forward, about twice the time"
    )
    gradient_checkpointing: bool = option(False, "recompute the LLM in backward: a third slower, a fraction of memory")
    zero_stage: int = option(2, "1 or 2 shard optimiser (and gradients); 3 also the frozen LLM, with more traffic")
    seed: int = option(0, "of initialisation, data order and candidates")
    log_every: int = option(10, "steps")
    eval_every: int = option(100, "steps between validations, the best of which is kept; 0: never")
    save_every: int = option(100, "steps between checkpoints; they hold trainables and optimiser only; 0: only the end")
    save_total_limit: int = option(2, "older checkpoints are removed; the best one stays")
    stop_at: int | None = option(None, "end with a checkpoint after this step, to be resumed later; null: at max_steps")
    resume: str = option("auto", "auto: from the newest complete checkpoint in output_dir; never; or a checkpoint")
    init_from: str | None = option(None, "exported compressor to start from, with a fresh optimiser")

    def __post_init__(self) -> None:
        _positive("train", self, "micro_batch_size", "gradient_accumulation_steps", "lr", "max_grad_norm")
        _positive("train", self, "log_every", "save_total_limit")
        _not_negative("train", self, "weight_decay", "distill_weight", "eval_every", "save_every")
        _in_unit_interval("train", self, "warmup_ratio", "min_lr_ratio")
        if self.zero_stage not in (1, 2, 3):
            raise ConfigError(f"train.zero_stage is {self.zero_stage}; choose 1, 2 or 3")


@dataclass
class TrainConfig:
    """A training run."""

    model: ModelSection = section(ModelSection)
    compressor: dict[str, Any] = option({}, "`method`, and the fields of that method")
    data: DataSection = section(DataSection)
    train: TrainSection = section(TrainSection)
    output_dir: str = option(MISSING, "checkpoints, log, TensorBoard events and the resolved config go here")

    def __post_init__(self) -> None:
        if "method" not in self.compressor:
            raise ConfigError("compressor.method is missing; name a method such as omnisift")


@dataclass
class EvalConfig:
    """An evaluation run: every method at every ratio on one manifest."""

    model: ModelSection = section(ModelSection)
    data: MediaSection = section(MediaSection)
    manifest: str = option(MISSING, "JSONL manifest with questions and answers")
    benchmark: str = option("manifest", "its name in the report")
    methods: list[str] = option(MISSING, "names of methods, or folders of exported compressors")
    ratios: list[float] = option([0.25], "retained ratios; the method full runs once")
    settings: dict[str, Any] = option({}, "by method name: its fields where they differ from the defaults")
    batch_size: int = option(1, "clips per forward; memory grows with it")
    max_new_tokens: int = option(16, "of an answer, decoded greedily")
    limit: int | None = option(None, "only the first clips of the manifest")
    bootstrap: int = option(2000, "resamples behind the 95 % intervals, clustered by clip")
    seed: int = option(0, "of random selection and bootstrap")
    output_dir: str = option(MISSING, "report.json, the table and the resolved config go here")

    def __post_init__(self) -> None:
        _positive("", self, "batch_size", "max_new_tokens", "bootstrap")
        if not self.methods:
            raise ConfigError("methods is empty; name at least one, for example methods=[full,random]")
        if bad := [ratio for ratio in self.ratios if not 0 < ratio <= 1]:
            raise ConfigError(f"ratios holds {bad[0]}; a retained ratio lies in (0, 1]")


# Reading.


def load_config(schema: type[Config], argv: Sequence[str]) -> Config:
    """Build a run's configuration from its command line.

    Args:
        schema: `TrainConfig` or `EvalConfig`.
        argv: arguments without the program's name: `--config FILE`, `a.b=c` overrides, `--print-config`, `--help`.
            `--local_rank N`, which the DeepSpeed launcher adds, is accepted and not used.

    Raises:
        ConfigError: the file or an override is wrong.
        SystemExit: after `--help` and `--print-config`, and for unknown flags.
    """
    parser = argparse.ArgumentParser(
        description=f"{(schema.__doc__ or '').strip()} Keys, with their types and defaults:\n\n" + describe(schema),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, such as those in recipes/")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.lr=1e-4 ratios='[0.25]'")
    args = parser.parse_intermixed_args(argv)
    config = read_config(schema, args.config, args.overrides)
    if args.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def read_config(schema: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and `a.b=c` overrides into `schema`.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong or missing.
    """
    merged = _merge(OmegaConf.structured(schema), _read_yaml(path), str(path))
    merged = _merge(merged, _parse_overrides(overrides), "command line")
    if missing := sorted(map(str, OmegaConf.missing_keys(merged))):
        raise ConfigError(f"{path}: {', '.join(missing)} must be given, in the file or as {missing[0]}=VALUE")
    try:
        return cast(Config, OmegaConf.to_object(merged))
    except ConfigError as error:
        raise ConfigError(f"{path}{' and command line' if overrides else ''}: {error}") from error


def check_fields(values: Mapping[str, Any], allowed: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check a free section, such as a method's fields, as strictly as the rest.

    Args:
        values: what was given.
        allowed: type (hint) of every field that exists.
        where: for messages, for example "recipes/x.yaml, compressor (omnisift)".

    Returns:
        The given fields, converted to their types.

    Raises:
        ConfigError: an unknown field or a value of the wrong type.
    """
    schema = make_dataclass("Section", [(name, hint, field(default=MISSING)) for name, hint in allowed.items()])
    merged = _merge(OmegaConf.structured(schema), dict(values), where)
    return {name: value for name, value in _plain(merged).items() if name in values}


def save_config(config: Any, path: str | Path) -> None:
    """Write a configuration as YAML that `read_config` reads back to an equal one."""
    Path(path).write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Any) -> str:
    """Return a configuration as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def describe(schema: type, prefix: str = "") -> str:
    """Return one paragraph per key: its name, type, default and what it costs."""
    lines = []
    hints = get_type_hints(schema)
    for item in fields(schema):
        hint = hints[item.name]
        if is_dataclass(hint):
            lines.append(describe(cast(type, hint), f"{prefix}{item.name}."))
            continue
        default = item.default_factory() if item.default_factory is not NO_DEFAULT else item.default
        shown = "required" if default == MISSING else f"default {'null' if default is None else default}"
        lines.append(f"  {prefix}{item.name}: {_type_name(hint)}, {shown}\n      {item.metadata['help']}")
    return "\n".join(lines)


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: must hold keys and values, but holds a list")
    return _plain(loaded)


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    for text in overrides:
        if not text.partition("=")[0] or "=" not in text:
            raise ConfigError(f"command line: {text!r} is not an override; write key=value, for example train.lr=1e-4")
    try:
        return _plain(OmegaConf.from_dotlist(list(overrides)))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"command line: {' '.join(overrides)}: {error}") from error


def _plain(loaded: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(loaded, resolve=False))


# Checking.


def _merge(base: DictConfig, values: Mapping[str, Any], where: str) -> DictConfig:
    """Lay `values` over `base`; every mistake becomes a `ConfigError` that starts with `where`."""
    schema = cast(type, OmegaConf.get_type(base))
    _check_keys(schema, values, where)
    try:
        return cast(DictConfig, OmegaConf.merge(base, values))
    except OmegaConfBaseException as error:
        key = str(error.full_key).partition("[")[0]
        value = OmegaConf.select(OmegaConf.create(dict(values)), key)
        raise ConfigError(f"{where}: {key} is {value!r}; expected {_type_name(_hint_of(schema, key))}") from error


def _check_keys(schema: type, values: Mapping[str, Any], where: str) -> None:
    """Refuse unknown keys, sections that are no mappings, and interpolations."""
    valid = dict(_all_keys(schema))
    for key, value in _walk(values, valid):
        if key not in valid:
            nearest = max(valid, key=lambda other: _likeness(key, other))
            raise ConfigError(f"{where}: unknown key {key!r}; the nearest valid key is {nearest!r}")
        if is_dataclass(valid[key]) and not isinstance(value, Mapping):
            example = next(name for name in valid if name.startswith(f"{key}."))
            raise ConfigError(f"{where}: {key} is {value!r}; expected a section with keys such as {example}")
        if "${" in str(value) and not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {key} is {value!r}; '${{' is not supported, use a YAML anchor")


def _walk(values: Mapping[str, Any], valid: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values, entering sections of the schema but not free mappings."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        yield key, value
        if isinstance(value, Mapping) and is_dataclass(valid.get(key)):
            yield from _walk(value, valid, f"{key}.")


def _all_keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of a schema, sections included, with its type."""
    for name, hint in get_type_hints(schema).items():
        yield f"{prefix}{name}", hint
        if is_dataclass(hint):
            yield from _all_keys(cast(type, hint), f"{prefix}{name}.")


def _hint_of(schema: type, key: str) -> Any:
    """Type of a dotted key; below a free mapping, that of the mapping."""
    valid = dict(_all_keys(schema))
    while key not in valid:
        key = key.rpartition(".")[0]
    return valid[key]


def _likeness(key: str, other: str) -> float:
    """How near two dotted keys are; the last name counts as much as the whole, so `lr` finds `train.lr`."""
    leaves = key.rpartition(".")[2], other.rpartition(".")[2]
    return SequenceMatcher(None, key, other).ratio() + SequenceMatcher(None, *leaves).ratio()


def _type_name(hint: Any) -> str:
    """A type as users say it: `float`, `int or null`, `one of a, b`."""
    if hint is NoneType:
        return "null"
    arguments = get_args(hint)
    if not arguments:
        return getattr(hint, "__name__", str(hint))
    origin = getattr(hint, "__origin__", None)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    return " or ".join(map(_type_name, arguments))


def _positive(prefix: str, values: Any, *names: str) -> None:
    _require(prefix, values, names, lambda value: value > 0, "must be above 0")


def _not_negative(prefix: str, values: Any, *names: str) -> None:
    _require(prefix, values, names, lambda value: value >= 0, "must not be negative")


def _in_unit_interval(prefix: str, values: Any, *names: str) -> None:
    _require(prefix, values, names, lambda value: 0 <= value <= 1, "must lie in [0, 1]")


def _require(prefix: str, values: Any, names: Sequence[str], holds: Any, rule: str) -> None:
    for name in names:
        if not holds(getattr(values, name)):
            raise ConfigError(f"{prefix}{'.' if prefix else ''}{name} is {getattr(values, name)}; it {rule}")
