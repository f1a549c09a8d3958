"""Settings that papers evaluated methods with, by name: data in `presets.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from omnisieve.compressors.ratios import RATIOS

FILE = Path(__file__).with_name("presets.yaml")


@dataclass(frozen=True)
class Preset:
    """One point of a paper's table.

    Attributes:
        name: paper/backbone/total in percent.
        methods: registered names of the methods that the source ran with it; others may take it too.
        backbone: that it was set for.
        source: paper and table, or published code.
        total: kept share of all media tokens, as the source states it.
        settings: fields of the methods.
        own: further fields of single methods, by method.
        window: video and audio tokens in 2 s of the source's clips, from which the total follows; None where it
            follows otherwise.
    """

    name: str
    methods: tuple[str, ...]
    backbone: str
    source: str
    total: float
    settings: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    window: tuple[int, int] | None = None

    def of(self, method: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a method with other values; a new ratio replaces all ratios, null is none."""
        given = {name: value for name, value in changes.items() if name not in RATIOS or value is not None}
        new_ratio = any(name in given for name in RATIOS)
        kept = {name: value for name, value in self.settings.items() if not (new_ratio and name in RATIOS)}
        return {**kept, **self.own.get(method, {}), **given}


@cache
def all_presets() -> Mapping[str, Preset]:
    """All presets by name."""
    found: dict[str, Preset] = {}
    for group in yaml.safe_load(FILE.read_text(encoding="utf-8")):
        entries = group.pop("presets")
        found |= {name: _preset(name, **(group | entry)) for name, entry in entries.items()}
    return found


def _preset(name: str, *, methods: list[str], window: list[int] | None, **fields: Any) -> Preset:
    return Preset(name, tuple(methods), window=None if window is None else (window[0], window[1]), **fields)
