"""What `--help` of the programs says about methods."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omnisieve.compressors import Compressor


def describe_methods(name: str | None = None) -> str:
    """All methods, one line each; or the fields of the method `name`, and the presets that were set for it.

    Raises:
        CompressorError: there is no such method; names the nearest.
    """
    # Importing methods takes a second, which only those who ask for them should wait.
    from omnisieve.compressors import compressor_type, list_compressors

    if name is not None:
        return _describe(compressor_type(name))
    width = max(map(len, list_compressors()))
    lines = [f"  {method:{width}}  {_summary(compressor_type(method))}" for method in list_compressors()]
    head = "Methods; --help METHOD lists the fields of one, and presets, which hold the settings of papers:"
    return "\n".join([head, "", *lines])


def _describe(method: type[Compressor]) -> str:
    from omnisieve.compressors.fields import fields_of
    from omnisieve.compressors.presets import all_presets

    lines = [f"{method.name}: {_summary(method)}", "", "Fields, with types and defaults:", ""]
    for field in fields_of(method.settings_type):
        default = "null" if field.default is None else field.default
        lines.append(f"  {field.name}: {field.kind}, default {default}\n      {field.help}")
    presets = [preset for preset in all_presets().values() if method.name in preset.methods]
    lines += ["", "Presets, with the share that stays on the clips of their source:", ""] if presets else []
    lines += [f"  {preset.name}: {preset.total:.0%}, {preset.source}, {preset.backbone}" for preset in presets]
    how = "compressor.preset=NAME" if method.learned else f"methods='[{method.name}@NAME]' in an evaluation"
    return "\n".join([*lines, *(["", f"Used by {how}."] if presets else [])])


def _summary(method: type[Compressor]) -> str:
    """The first sentence of the docstring of a method's file, behind its name there, and what sets it apart."""
    text = " ".join((sys.modules[method.__module__].__doc__ or "").split())
    sentence = text.partition(": ")[2].partition(". ")[0].rstrip(".")
    return sentence + "; audio stays whole" * method.audio_intact + "; is trained" * method.learned
