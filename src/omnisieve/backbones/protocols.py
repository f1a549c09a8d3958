"""From a configuration and a model to the protocol by which media are read."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from transformers import ProcessorMixin

from omnisieve.backbones.families import uses_released_tokens
from omnisieve.config import ConfigError, MediaSection
from omnisieve.data.protocol import PRESETS, Protocol

_BY_PROCESSOR = "processor"
_KEYS = ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")


def protocol_of(media: MediaSection, config: Any, processor: ProcessorMixin | None = None) -> Protocol:
    """The protocol of a run, all values known.

    Args:
        media: `protocol`, and the keys that count instead of its values. `min_pixels` and `max_pixels` are also those
            of images.
        config: of the model's thinker.
        processor: of the model; without it, its own sizes are not known.

    Raises:
        ConfigError: there is no such protocol, it needs the processor, or the keys contradict its values.
    """
    name = media.protocol or ("qwen_omni_utils" if uses_released_tokens(config) else _BY_PROCESSOR)
    vision = config.vision_config
    if name in PRESETS:
        found = PRESETS[name].protocol(name, vision.patch_size * vision.spatial_merge_size)
    elif name != _BY_PROCESSOR:
        known = (_BY_PROCESSOR, *PRESETS)
        (nearest,) = difflib.get_close_matches(name, known, 1, 0)
        raise ConfigError(f"data.protocol {name!r} is none of {', '.join(known)}; the nearest is {nearest!r}")
    elif processor is None:
        raise ConfigError(
            f"data.protocol {_BY_PROCESSOR} needs the processor of a model, and only its shapes are known here: choose "
            f"one of {', '.join(PRESETS)}"
        )
    elif media.min_frames is not None:
        raise ConfigError(
            f"data.min_frames has no meaning under data.protocol {_BY_PROCESSOR}, which takes frames by time"
        )
    else:
        found = _of_processor(processor)
    given = {key: value for key in _KEYS if (value := getattr(media, key)) is not None}
    images = {f"{edge}_image_pixels": given[f"{edge}_pixels"] for edge in ("min", "max") if f"{edge}_pixels" in given}
    found = replace(found, **given, **images)
    if found.placement == "even" and found.max_frames is not None and found.max_frames < max(found.min_frames, 2):
        raise ConfigError(
            f"data.min_frames {found.min_frames} is above data.max_frames {found.max_frames} (data.protocol {name} "
            "takes 2 at least): set both keys, or choose another data.protocol"
        )
    for kind, low, high in (
        ("frames", found.min_pixels, found.max_pixels),
        ("images", found.min_image_pixels, found.max_image_pixels),
    ):
        if low > high:
            raise ConfigError(
                f"data.min_pixels {low} is above data.max_pixels {high} ({kind}, data.protocol {name}): set both keys, "
                "or choose another data.protocol"
            )
    return found


def _of_processor(processor: ProcessorMixin) -> Protocol:
    video, image = dict(processor.video_processor.size), dict(processor.image_processor.size)
    return Protocol(
        name=_BY_PROCESSOR,
        placement="steps",
        fps=2.0,
        min_frames=1,
        max_frames=getattr(processor.video_processor, "max_frames", None),
        min_pixels=video["shortest_edge"],
        max_pixels=video["longest_edge"],
        total_pixels=None,
        min_image_pixels=image["shortest_edge"],
        max_image_pixels=image["longest_edge"],
    )
