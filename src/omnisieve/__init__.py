"""Token compressors for omni-modal LLMs: train them, export them, compare them.

from omnisieve import attach, load_backbone, load_compressor, load_processor, prepare

model = load_backbone("Qwen/Qwen2.5-Omni-7B", "bfloat16", device="cuda")
processor = load_processor("Qwen/Qwen2.5-Omni-7B")
inputs = prepare(model, processor, "clip.mp4", "What is heard?")
with attach(model, load_compressor("my_compressor").to(model.device)):
    ids = model.generate(**inputs, max_new_tokens=256, do_sample=False)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnisieve.artifact import load_compressor, push_compressor, save_compressor
    from omnisieve.backbones.attach import attach
    from omnisieve.backbones.loading import load_backbone
    from omnisieve.backbones.media import load_processor
    from omnisieve.backbones.prepare import prepare
    from omnisieve.compressors import Compressor, build_compressor, list_compressors, list_presets
    from omnisieve.trained_llm import tune_llm, tuned_llm

__version__ = "0.1.0"

__all__ = [
    "Compressor",
    "attach",
    "build_compressor",
    "list_compressors",
    "list_presets",
    "load_backbone",
    "load_compressor",
    "load_processor",
    "prepare",
    "push_compressor",
    "save_compressor",
    "tune_llm",
    "tuned_llm",
]

_HOMES = {
    "Compressor": "omnisieve.compressors",
    "attach": "omnisieve.backbones",
    "build_compressor": "omnisieve.compressors",
    "list_compressors": "omnisieve.compressors",
    "list_presets": "omnisieve.compressors",
    "load_backbone": "omnisieve.backbones",
    "load_compressor": "omnisieve.artifact",
    "load_processor": "omnisieve.backbones.media",
    "prepare": "omnisieve.backbones.prepare",
    "push_compressor": "omnisieve.artifact",
    "save_compressor": "omnisieve.artifact",
    "tune_llm": "omnisieve.trained_llm",
    "tuned_llm": "omnisieve.trained_llm",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import omnisieve` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
