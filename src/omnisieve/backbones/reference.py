"""The shapes of the released models, for dry runs and cost figures where no weights can be had.

The library defaults are not these models: the vision tower of `Qwen2_5OmniThinkerConfig` is wider than the released
one, `Qwen3OmniMoeThinkerConfig` has fewer layers and 25 rope ids per second, and M-RoPE sections and the vision start
token are missing in both.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen2_5OmniThinkerConfig, Qwen3OmniMoeThinkerConfig

from omnisieve.backbones.families import family_of
from omnisieve.backbones.protocols import protocol_of
from omnisieve.config import MediaSection
from omnisieve.data.feature_shards import stored_bytes

_QWEN2_5_TEXT = {
    "qwen2_5_omni_7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "qwen2_5_omni_3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
}
_QWEN3_TEXT = {
    "qwen3_omni_30b_a3b": {
        "hidden_size": 2048,
        "intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "vocab_size": 152064,
        "max_position_embeddings": 65536,
    },
}
SHAPES = (*_QWEN2_5_TEXT, *_QWEN3_TEXT)
_VISION_TOKENS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_MEL_FRAMES_PER_SECOND = 100


def reference_config(name: str) -> PretrainedConfig:
    """The thinker's config of a released model.

    Args:
        name: "qwen2_5_omni_7b", "qwen2_5_omni_3b" or "qwen3_omni_30b_a3b".

    Raises:
        ValueError: for another name.
    """
    if name in _QWEN2_5_TEXT:
        return _qwen2_5(_QWEN2_5_TEXT[name])
    if name in _QWEN3_TEXT:
        return _qwen3(_QWEN3_TEXT[name])
    raise ValueError(f"no reference shapes for {name!r}; known are {', '.join(SHAPES)}")


def cache_bytes(name: str, stored: str, seconds: float = 60.0, media: MediaSection | None = None) -> int:
    """At most so large is one video with sound in a feature cache without statistics.

    Args:
        name: of a released model, see `reference_config`.
        stored: "bfloat16", "float32" or "int8".
        seconds: length of the video.
        media: how it is sampled; the defaults when None. Its frames are taken to be as large as it allows.

    Raises:
        ConfigError: `media` asks for the processor's own sizes.
    """
    config, media = reference_config(name), media or MediaSection()
    family = family_of(config.model_type)
    assert family is not None, "there are shapes of supported families only"
    rules, vision = family.token_rules(config), config.vision_config
    protocol = protocol_of(media, config)
    wanted = max(int(seconds * protocol.fps), protocol.min_frames)
    frames = wanted if protocol.max_frames is None else min(wanted, protocol.max_frames)
    grids = -(-frames // rules.temporal_patch_size)
    video = grids * (protocol.frame_pixels(frames) // (vision.patch_size * rules.spatial_merge_size) ** 2)
    audio = rules.audio_tokens(int(min(seconds, media.audio.max_seconds) * _MEL_FRAMES_PER_SECOND))
    layers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    return stored_bytes(video * layers + audio, config.text_config.hidden_size, stored)


def _qwen2_5(text: dict[str, Any]) -> PretrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}
    return Qwen2_5OmniThinkerConfig(
        text_config={**text, "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "out_hidden_size": text["hidden_size"],
        },
        audio_config={
            "d_model": 1280,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "num_mel_bins": 128,
            "n_window": 100,
            "output_dim": text["hidden_size"],
        },
        audio_token_id=151646,
        audio_start_token_id=151647,
        audio_end_token_id=151648,
        position_id_per_seconds=25,
        seconds_per_chunk=2,
        **_VISION_TOKENS,
    )


def _qwen3(text: dict[str, Any]) -> PretrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    return Qwen3OmniMoeThinkerConfig(
        text_config={**text, "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config={
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "patch_size": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
            "out_hidden_size": text["hidden_size"],
        },
        audio_config={
            "d_model": 1280,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "num_mel_bins": 128,
            "n_window": 50,
            "n_window_infer": 800,
            "downsample_hidden_size": 480,
            "output_dim": text["hidden_size"],
        },
        audio_token_id=151675,
        audio_start_token_id=151669,
        audio_end_token_id=151670,
        position_id_per_seconds=13,
        seconds_per_chunk=2,
        **_VISION_TOKENS,
    )
