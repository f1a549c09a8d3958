"""Which protocol a run has, and which of its values the configuration changes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest

from omnisieve.backbones import adapter_for
from omnisieve.backbones.families import uses_released_tokens
from omnisieve.backbones.media import reader
from omnisieve.backbones.protocols import protocol_of
from omnisieve.backbones.reference import SHAPES, reference_config
from omnisieve.config import ConfigError, MediaSection
from omnisieve.data.protocol import PRESETS, Protocol
from tests.data.stock import stock_processor, stock_thinker
from tests.models import FAMILIES

SEVEN_B, THIRTY_B = reference_config("qwen2_5_omni_7b"), reference_config("qwen3_omni_30b_a3b")


def test_the_configuration_names_every_preset_and_no_other() -> None:
    names = [get_args(hint) for hint in get_args(get_type_hints(MediaSection)["protocol"])]
    assert ("processor", *PRESETS) in names


@pytest.mark.parametrize(("name", "config", "values"), [
    ("qwen_omni_utils", SEVEN_B, (4, 768, 100_352, 602_112, 90_316_800, 3_136, 12_845_056)),
    ("omnisift", SEVEN_B, (4, 256, 100_352, 250_880, 90_316_800, 3_136, 12_845_056)),
    ("omnizip", SEVEN_B, (4, 128, 100_352, 112_896, 90_316_800, 3_136, 12_845_056)),
    ("seats", SEVEN_B, (4, 128, 100_352, 112_896, 90_316_800, 3_136, 12_845_056)),
    ("qwen_omni_utils", THIRTY_B, (4, 768, 131_072, 786_432, 117_964_800, 4_096, 16_777_216)),
    ("omnisift", THIRTY_B, (4, 256, 131_072, 327_680, 117_964_800, 4_096, 16_777_216)),
])  # fmt: skip
def test_a_name_sets_all_values(name: str, config: Any, values: tuple[int, ...]) -> None:
    assert protocol_of(MediaSection(protocol=name), config) == Protocol(name, "even", 2.0, *values)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_says_its_own(family: str) -> None:
    processor, config = stock_processor(family), stock_thinker(family).config
    size = processor.video_processor.size
    found = protocol_of(MediaSection(), config, processor)
    edges = size["shortest_edge"], size["longest_edge"]
    assert found == Protocol("processor", "steps", 2.0, 1, 768, *edges, None, *edges)
    assert protocol_of(MediaSection(protocol="processor"), config, processor) == found


def test_a_released_vocabulary_chooses_the_protocol_of_the_released_models() -> None:
    for shapes in SHAPES:
        assert uses_released_tokens(reference_config(shapes))
        assert protocol_of(MediaSection(), reference_config(shapes)).name == "qwen_omni_utils"
    other = deepcopy(SEVEN_B)
    other.video_token_id = 5
    assert not uses_released_tokens(other)
    assert protocol_of(MediaSection(), other, stock_processor()).name == "processor"


@pytest.mark.parametrize(
    ("key", "value"),
    [("fps", 1.0), ("min_frames", 8), ("max_frames", 6), ("total_pixels", 10**7), ("min_pixels", 5000)],
)
def test_a_single_key_counts_instead_of_its_value_alone(key: str, value: float) -> None:
    whole = protocol_of(MediaSection(protocol="omnisift"), SEVEN_B)
    changed = protocol_of(MediaSection(protocol="omnisift", **{key: value}), SEVEN_B)
    images = {"min_image_pixels": value} if key == "min_pixels" else {}
    assert changed == replace(whole, **{key: value}, **images)
    assert changed != whole


def test_what_cannot_be_names_the_keys() -> None:
    with pytest.raises(ConfigError, match=r"'omnisifft' is none of .*; the nearest is 'omnisift'"):
        protocol_of(MediaSection(protocol="omnisifft"), SEVEN_B)
    with pytest.raises(ConfigError, match=r"data\.min_pixels 100352 is above data\.max_pixels 6272 .*set both"):
        protocol_of(MediaSection(max_pixels=6272), SEVEN_B)
    with pytest.raises(ConfigError, match=r"data\.min_frames has no meaning under data\.protocol processor"):
        protocol_of(MediaSection(protocol="processor", min_frames=8), SEVEN_B, stock_processor())
    with pytest.raises(ConfigError, match=r"data\.min_frames 1000 is above data\.max_frames 768"):
        protocol_of(MediaSection(min_frames=1000), SEVEN_B)
    with pytest.raises(ConfigError, match=r"data\.max_frames 1 .*takes 2 at least"):
        protocol_of(MediaSection(min_frames=1, max_frames=1), SEVEN_B)
    with pytest.raises(ConfigError, match="needs the processor of a model"):
        protocol_of(MediaSection(protocol="processor"), SEVEN_B)


def test_files_are_read_by_the_resolved_values() -> None:
    adapter = adapter_for(stock_thinker())
    loader = reader(stock_processor(), adapter, MediaSection(protocol="omnisift", fps=1.0))
    assert (loader.fps, loader.min_frames, loader.max_frames, loader.placement) == (1.0, 4, 256, "even")
    assert loader.preprocessor.total_pixels == 90_316_800
    key = loader.preprocessing("weights")
    assert (key["placement"], key["min_frames"], key["total_pixels"]) == ("even", 4, 90_316_800)


def test_the_key_of_a_testbed_cache_says_what_it_said_and_how_media_are_read() -> None:
    loader = reader(stock_processor(), adapter_for(stock_thinker()), MediaSection(max_frames=256, max_pixels=250_880))
    key = loader.preprocessing("weights")
    size = {"shortest_edge": 3136, "longest_edge": 250_880}
    assert (key["fps"], key["max_frames"]) == (2.0, 256)
    assert (key["video_size"].items(), key["image_size"].items()) >= (size.items(), size.items())
    assert key.pop("sound") == "mean of channels, resampled as soxr HQ"
    assert key.pop("pictures") == "frames by time stamps; on white, deep ones scaled"
    assert key.keys() == {
        "fps", "max_frames", "audio_seconds", "rules", "weights", "processors", "video_size", "image_size",
    }  # fmt: skip
