"""The stock processors and rope functions, as references."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from omnisieve.backbones import adapter_for
from omnisieve.data.tokens import TokenRules
from tests.models import QWEN2_5, QWEN3, QWEN3_PATCH, tiny_config

BACKBONE = Path(__file__).parents[2] / "data" / "testbed" / "backbone"
_TOKENS = {
    "image_token_id": "image_token",
    "video_token_id": "video_token",
    "audio_token_id": "audio_token",
    "audio_start_token_id": "audio_bos_token",
    "audio_end_token_id": "audio_eos_token",
    "vision_start_token_id": "vision_bos_token",
    "vision_end_token_id": "vision_eos_token",
}


@lru_cache(maxsize=2)
def stock_processor(family: str = QWEN2_5) -> Any:
    """The testbed's; that of Qwen3 shares its tokenizer, chat template and feature extractor."""
    processor = Qwen2_5OmniProcessor.from_pretrained(BACKBONE)
    if family == QWEN2_5:
        return processor
    size = {"shortest_edge": 64 * 64, "longest_edge": 768 * 32 * 32}
    return Qwen3OmniMoeProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=QWEN3_PATCH, size=size),
        video_processor=Qwen2VLVideoProcessor(patch_size=QWEN3_PATCH, size=size),
        feature_extractor=processor.feature_extractor,
        tokenizer=processor.tokenizer,
        chat_template=processor.chat_template,
    )


@lru_cache(maxsize=2)
def stock_thinker(family: str = QWEN2_5) -> Any:
    """Without weights: only its position rule is used."""
    with torch.device("meta"):
        if family == QWEN2_5:
            return Qwen2_5OmniThinkerForConditionalGeneration(AutoConfig.from_pretrained(BACKBONE))
        return Qwen3OmniMoeThinkerForConditionalGeneration(_qwen3_config())


def save_qwen3(folder: Path) -> Path:
    """A random thinker of Qwen3 and its processor, in a folder as users have them."""
    torch.manual_seed(0)
    model = Qwen3OmniMoeThinkerForConditionalGeneration(_qwen3_config())
    model.save_pretrained(folder)
    stock_processor(QWEN3).save_pretrained(folder)
    return folder


def _qwen3_config() -> Any:
    """The tiny one, for the testbed's tokenizer."""
    config, tokenizer = tiny_config(family=QWEN3), stock_processor(QWEN3).tokenizer
    for name, token in _TOKENS.items():
        setattr(config, name, tokenizer.convert_tokens_to_ids(getattr(tokenizer, token)))
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.pad_token_id, config.text_config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    return config


@lru_cache(maxsize=2)
def rules(family: str = QWEN2_5) -> TokenRules:
    return adapter_for(stock_thinker(family)).token_rules()


def stock_positions(
    input_ids: torch.Tensor,
    video_grids: list[tuple[int, int, int]],
    image_grids: list[tuple[int, int, int]],
    seconds_per_grid: list[float],
    mel_frames: list[int],
    *,
    sound_in_video: bool,
    family: str = QWEN2_5,
) -> torch.Tensor:
    """Positions [3, S] of one sample by the stock rule."""
    positions, _ = stock_thinker(family).get_rope_index(
        input_ids[None],
        torch.tensor(image_grids) if image_grids else None,
        torch.tensor(video_grids) if video_grids else None,
        torch.ones_like(input_ids[None]),
        sound_in_video,
        torch.tensor(mel_frames) if mel_frames else None,
        torch.tensor(seconds_per_grid) if seconds_per_grid else None,
    )
    return positions[:, 0]
