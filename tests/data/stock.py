"""The stock processor and rope function, as references."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoConfig, Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from omnisieve.data.tokens import TokenRules

BACKBONE = Path(__file__).parents[2] / "data" / "testbed" / "backbone"


@lru_cache(maxsize=1)
def stock_processor() -> Qwen2_5OmniProcessor:
    return Qwen2_5OmniProcessor.from_pretrained(BACKBONE)


@lru_cache(maxsize=1)
def stock_thinker() -> Qwen2_5OmniThinkerForConditionalGeneration:
    """Without weights: only its position rule is used."""
    with torch.device("meta"):
        return Qwen2_5OmniThinkerForConditionalGeneration(AutoConfig.from_pretrained(BACKBONE))


@lru_cache(maxsize=1)
def rules() -> TokenRules:
    config = stock_thinker().config
    return TokenRules(
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        audio_token_id=config.audio_token_id,
        audio_start_token_id=config.audio_start_token_id,
        audio_end_token_id=config.audio_end_token_id,
        spatial_merge_size=config.vision_config.spatial_merge_size,
        temporal_patch_size=config.vision_config.temporal_patch_size,
        ids_per_second=config.position_id_per_seconds,
        seconds_per_chunk=config.seconds_per_chunk,
    )


def stock_positions(
    input_ids: torch.Tensor,
    video_grids: list[tuple[int, int, int]],
    image_grids: list[tuple[int, int, int]],
    seconds_per_grid: list[float],
    mel_frames: list[int],
    *,
    sound_in_video: bool,
) -> torch.Tensor:
    """Positions [3, S] of one sample by the stock rule."""
    positions, _ = stock_thinker().get_rope_index(
        input_ids[None],
        torch.tensor(image_grids) if image_grids else None,
        torch.tensor(video_grids) if video_grids else None,
        torch.ones_like(input_ids[None]),
        sound_in_video,
        torch.tensor(mel_frames) if mel_frames else None,
        torch.tensor(seconds_per_grid) if seconds_per_grid else None,
    )
    return positions[:, 0]
