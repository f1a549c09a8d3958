"""Reading a YAML file and dotted overrides into a schema, without silent mistakes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import field, fields, is_dataclass, make_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from omnisieve.config.keys import ConfigError
from omnisieve.config.schema import EvalConfig, TrainConfig

Config = TypeVar("Config")
_PROGRAMS = {TrainConfig: "train.py", EvalConfig: "eval.py"}


def load_config(
    schema: type[Config],
    argv: Sequence[str],
    *,
    description: str | None = None,
    method_help: Callable[[str | None], str] = lambda _: "",
) -> Config:
    """Build a run's configuration from its command line.

    Args:
        schema: `TrainConfig` or `EvalConfig`.
        argv: arguments without the program's name: `--config FILE`, `a.b=c` overrides, `--print-config`, `--help`.
            `--local_rank N`, which the DeepSpeed launcher adds, is accepted and not used.
        description: begins the help; what the schema says of itself when None.
        method_help: text on the method that `--help` names, or for None on all; ValueError for a method that there is
            not. Called for help only.

    Raises:
        ConfigError: the file or an override is wrong.
        SystemExit: after `--help` and `--print-config`, and for unknown flags.
    """
    about = (description or schema.__doc__ or "").strip()
    parser = argparse.ArgumentParser(
        description=f"{about}\n\nKeys, with their types and defaults:\n\n{describe(schema)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    about_help = "show this text, or the fields of one method, and stop"
    parser.add_argument(
        "-h", "--help", nargs="?", metavar="METHOD", action=_Help, method_help=method_help, help=about_help
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


class _Help(argparse.Action):
    """`--help`, which may name a method."""

    def __init__(self, *args: Any, method_help: Callable[[str | None], str], **options: Any) -> None:
        super().__init__(*args, **options)
        self._method_help = method_help

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        try:
            text = self._method_help(values)
        except ValueError as error:
            parser.error(str(error))
        print(text if values else f"{parser.format_help()}\n{text}".rstrip())
        parser.exit()


def read_config(schema: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and `a.b=c` overrides into `schema`.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong or missing.
    """
    values = read_yaml(path)
    _check_program(schema, values, path)
    merged = _merge(OmegaConf.structured(schema), values, str(path))
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


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's keys and values, not checked against any schema.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: there is no such file")
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
        hint = _hint_of(schema, key)
        form = f", such as {key}='[{value}]'" if get_origin(hint) is list and isinstance(value, str) else ""
        raise ConfigError(f"{where}: {key} is {value!r}; expected {_type_name(hint)}{form}") from error
    except TypeError as error:  # a list where a mapping belongs
        raise ConfigError(f"{where}: {error}") from error


def _check_program(schema: type, values: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a recipe of the other program, which would be one unknown key after the other."""
    own = {field.name for field in fields(schema)}
    for other, program in _PROGRAMS.items():
        foreign = [field.name for field in fields(other) if field.name in values and field.name not in own]
        if foreign and not own - {field.name for field in fields(other)} & set(values):
            raise ConfigError(
                f"{path} looks like a recipe of {program}, it has {', '.join(foreign[:3])}: use {program}, or choose "
                "another recipe"
            )


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
