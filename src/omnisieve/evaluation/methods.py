"""From an entry of `methods` to compressors: registry names, exported folders, presets, variants and bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omnisieve.artifact import is_artifact, load_compressor, locate, read_config
from omnisieve.compressors import (
    Compressor,
    CompressorError,
    UnreachableRatioError,
    build_compressor,
    compressor_type,
    find_preset,
)
from omnisieve.compressors.plugins import load_plugin
from omnisieve.compressors.presets import Preset
from omnisieve.compressors.ratios import RATIOS
from omnisieve.evaluation.bounds import BOUNDS, NoMedia, build_bound
from omnisieve.evaluation.report import Kind
from omnisieve.trained_llm import has_tuned_llm, lora_of

AT_PRESET = "@"
"""Between a method and a preset that it is evaluated at."""
BY_RATIO = "at"
"""Key of a method's settings that holds settings for single ratios: `at: {0.25: {audio_ratio: 0.4}}`."""

ON_LLM = "llm"
"""Key of a method's settings: the export whose adapters the LLM has meanwhile; null: the LLM of model.path."""


@dataclass(frozen=True)
class Method:
    """One entry of `methods`.

    Attributes:
        label: what its rows are called: the entry as it was given.
        name: the registered method behind it.
        kind: see `report.Kind`.
        settings: fields of the method, without the ratio unless it comes from a preset.
        at: further fields per ratio.
        folder: of an exported compressor, None for registered methods.
        preset: that it is evaluated at, with the preset's ratios; None: at any ratio.
        llm: export whose adapters the LLM has; None: the LLM as it was loaded.
    """

    label: str
    name: str
    kind: Kind
    settings: Mapping[str, Any] = field(default_factory=dict)
    at: Mapping[float, Mapping[str, Any]] = field(default_factory=dict)
    folder: Path | None = None
    preset: Preset | None = None
    llm: Path | None = None

    def ratios(self, asked: Sequence[float]) -> Sequence[float]:
        """The ratios it is evaluated at; all tokens are all tokens, and none are none, once."""
        if self.kind == "full":
            return (1.0,)
        if self.preset is not None:
            return (self.preset.total,)
        return (0.0,) if self.name == NoMedia.name else tuple(dict.fromkeys(asked))

    def fields_at(self, ratio: float) -> dict[str, Any]:
        """The settings at one ratio."""
        # No compressor knows a ratio of 0; the one that keeps nothing takes any. A preset has its own ratios.
        common = {} if self.preset is not None else {"retained_ratio": ratio or 1.0}
        return common | dict(self.settings) | dict(self.at.get(ratio, {}))

    def build(self, ratio: float) -> Compressor:
        """The compressor at one ratio, in evaluation mode.

        Raises:
            CompressorError: settings that the method does not have, or values that cannot be.
        """
        if self.kind == "bound":
            return build_bound(self.name, **self.fields_at(ratio))
        if self.folder is not None:
            return load_compressor(self.folder, **self._replaced(ratio))
        return build_compressor(self.name, **self.fields_at(ratio)).eval()

    def _replaced(self, ratio: float) -> dict[str, Any]:
        """What replaces the settings of an exported compressor: at the ratio that it was trained for, no ratio does,
        so that its own split between video and audio stays."""
        fields = self.fields_at(ratio)
        own = self.folder is not None and read_config(self.folder)["settings"].get("retained_ratio")
        if own == ratio and not any(name in fields for name in RATIOS if name != "retained_ratio"):
            del fields["retained_ratio"]
        return fields


def resolve_methods(
    entries: Sequence[str], settings: Mapping[str, Mapping[str, Any]], plugins: Sequence[str] = ()
) -> list[Method]:
    """Read the entries of a configuration.

    Args:
        entries: registered names, folders of exported compressors or their names on the hub, bounds (`oracle`,
            `no_media`), each of them also at a preset ("random@seats/7b/35", whose own ratio it then has), or keys of
            `settings` that name their method.
        settings: per entry its fields; `method` makes the entry a variant of that method under a name of its own,
            `at` holds fields per ratio, `llm` names the export whose tuned LLM answers (an export with one brings its
            own; null: the LLM of model.path).
        plugins: Python files that register further methods.

    Raises:
        CompressorError: what an entry names does not exist, must be trained first, or needs an LLM that was tuned as
            a whole.
    """
    for path in plugins:
        load_plugin(path)
    methods = [_resolve(entry, dict(settings.get(entry, {}))) for entry in dict.fromkeys(entries)]
    for key, fields in settings.items():
        # A recipe may hold settings of methods that are not run, but no misspelt ones.
        if not (key in entries or "/" in key or "method" in fields or key in BOUNDS):
            compressor_type(key)
    # All tokens come first, the others are shares of them.
    return sorted(methods, key=lambda method: method.kind != "full")


def check_methods(methods: Sequence[Method], ratios: Sequence[float], hidden_size: int) -> None:
    """Build every compressor once, before the LLM is there.

    Args:
        methods: see `resolve_methods`.
        ratios: asked of each method; what a method cannot reach makes a row that says so.
        hidden_size: D of the LLM.

    Raises:
        CompressorError: settings that a method does not have, values that cannot be, or a compressor for another LLM.
    """
    for method in methods:
        for ratio in method.ratios(ratios):
            with suppress(UnreachableRatioError):
                width = getattr(method.build(ratio), "hidden_size", hidden_size)
                if width != hidden_size:
                    raise CompressorError(f"{method.label} is for hidden size {width}, the model has {hidden_size}")


def _resolve(label: str, settings: dict[str, Any]) -> Method:
    name = str(settings.pop("method", label))
    said, asked = ON_LLM in settings, settings.pop(ON_LLM, None)
    llm = None if asked is None else _llm(asked)
    at = {float(ratio): dict(values) for ratio, values in dict(settings.pop(BY_RATIO, {})).items()}
    preset = None
    if AT_PRESET in name and not is_artifact(name):
        name, _, preset_name = name.partition(AT_PRESET)
        preset = find_preset(preset_name)
        settings = _at_preset(label, name, preset, settings)
    if name in BOUNDS:
        return Method(label, name, "bound", settings, at, preset=preset, llm=llm)
    if "/" in name or is_artifact(name):
        folder = locate(name)
        registered = read_config(folder)["method"]
        if not said and has_tuned_llm(folder):
            llm = _llm(folder)
        return Method(label, registered, _kind(registered), settings, at, folder, preset, llm)
    if compressor_type(name).learned:
        raise CompressorError(f"{name} is learned: name the folder of an exported one instead of {name!r}")
    return Method(label, name, _kind(name), settings, at, preset=preset, llm=llm)


def _llm(export: str | Path) -> Path:
    """The folder of an export whose adapters a loaded LLM can put on."""
    lora_of(export)
    return locate(export)


def _at_preset(label: str, name: str, preset: Preset, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's fields with those that were given."""
    if given := [name for name in RATIOS if name in settings]:
        raise CompressorError(f"{label}: {given[0]} is given, but the preset has ratios of its own; leave one out")
    return preset.of(name, settings)


def _kind(name: str) -> Kind:
    if name == "full":
        return "full"
    return "learned" if compressor_type(name).learned else "training-free"
