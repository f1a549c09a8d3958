"""The shapes of the released models, for dry runs and cost figures where no weights can be had.

The library default of `Qwen2_5OmniThinkerConfig` is not the 7B model: its vision tower is wider than the released
one, and M-RoPE sections and the vision start token are missing.
"""

from __future__ import annotations

from transformers import Qwen2_5OmniThinkerConfig

_TEXT = {
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
SHAPES = tuple(_TEXT)


def reference_config(name: str) -> Qwen2_5OmniThinkerConfig:
    """The thinker's config of a released model.

    Args:
        name: "qwen2_5_omni_7b" or "qwen2_5_omni_3b".

    Raises:
        ValueError: for another name.
    """
    if name not in _TEXT:
        raise ValueError(f"no reference shapes for {name!r}; known are {', '.join(_TEXT)}")
    text = _TEXT[name]
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
        image_token_id=151655,
        video_token_id=151656,
        audio_token_id=151646,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        audio_start_token_id=151647,
        audio_end_token_id=151648,
        position_id_per_seconds=25,
        seconds_per_chunk=2,
    )
