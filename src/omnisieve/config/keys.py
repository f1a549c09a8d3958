"""How a key is declared, and what its value must satisfy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any

from omegaconf import MISSING


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


def positive(prefix: str, values: Any, *names: str) -> None:
    """Refuse values of these names that are not above 0."""
    require(prefix, values, names, lambda value: value > 0, "must be above 0")


def not_negative(prefix: str, values: Any, *names: str) -> None:
    """Refuse values of these names below 0."""
    require(prefix, values, names, lambda value: value >= 0, "must not be negative")


def in_unit_interval(prefix: str, values: Any, *names: str) -> None:
    """Refuse values of these names outside [0, 1]."""
    require(prefix, values, names, lambda value: 0 <= value <= 1, "must lie in [0, 1]")


def require(prefix: str, values: Any, names: Sequence[str], holds: Callable[[float], bool], rule: str) -> None:
    """Refuse values for which `holds` does not; the message ends with `rule`."""
    for name in names:
        value = getattr(values, name)
        # A section's defaults are made before the file is read; what is then still missing is reported elsewhere.
        if value != MISSING and not holds(value):
            raise ConfigError(f"{prefix}{'.' if prefix else ''}{name} is {value}; it {rule}")
