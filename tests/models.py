"""Tiny random thinkers of stock classes, Qwen2.5-Omni and Qwen3-Omni, and inputs for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from tests.layouts import FAMILIES as FAMILIES
from tests.layouts import QWEN2_5, QWEN3

HIDDEN = 32
PAD, EOS, IMAGE, AUDIO, VIDEO, AUDIO_START, AUDIO_END, VISION_START, VISION_END = range(9)
FIRST_WORD, VOCABULARY = 9, 64
IDS_PER_SECOND, IDS_PER_WINDOW, PATCH, MERGE, MEL_BINS = 25, 50, 14, 2, 128
QWEN3_IDS_PER_SECOND, QWEN3_PATCH = 13, 16
DEEPSTACK_LAYERS = 2


def tiny_config(layers: int = 3, family: str = QWEN2_5) -> PretrainedConfig:
    """Configuration of the tiny thinker: width 32, 4 heads over 2 KV heads, towers of 2 or 3 layers.

    That of Qwen3 has 2 of 4 experts per token, and deepstack features for two decoder layers.
    """
    return _qwen3_config(layers) if family == QWEN3 else _qwen2_5_config(layers)


def _qwen2_5_config(layers: int) -> Qwen2_5OmniThinkerConfig:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [1],
        "window_size": 56,
        "patch_size": PATCH,
    }
    audio = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "output_dim": HIDDEN,
        "num_mel_bins": MEL_BINS,
        "n_window": 100,
    }
    return Qwen2_5OmniThinkerConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        image_token_index=IMAGE,
        audio_token_index=AUDIO,
        video_token_index=VIDEO,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        position_id_per_seconds=IDS_PER_SECOND,
        seconds_per_chunk=2,
    )


def _qwen3_config(layers: int) -> Qwen3OmniMoeThinkerConfig:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "patch_size": QWEN3_PATCH,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": list(range(DEEPSTACK_LAYERS)),
    }
    audio = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "output_dim": HIDDEN,
        "num_mel_bins": MEL_BINS,
        "downsample_hidden_size": 4,
    }
    return Qwen3OmniMoeThinkerConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        video_token_id=VIDEO,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        position_id_per_seconds=QWEN3_IDS_PER_SECOND,
    )


def tiny_thinker(
    seed: int = 0,
    *,
    layers: int = 3,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    family: str = QWEN2_5,
) -> nn.Module:
    """A random thinker in eval mode, frozen. Weights are large enough that every token matters to the output."""
    torch.manual_seed(seed)
    config = tiny_config(layers, family)
    config._attn_implementation = attention
    thinker: Any = (
        Qwen3OmniMoeThinkerForConditionalGeneration if family == QWEN3 else Qwen2_5OmniThinkerForConditionalGeneration
    )
    model = thinker._from_config(config, dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=2.0 * parameter[0].numel() ** -0.5)
    # Ending early would make generated sequences of a batch differ in length.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval().requires_grad_(False)


def checkpoint_layers(model: Any) -> None:
    """Recompute the layers in backward; earlier versions of transformers have the other name only."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def family_of(model: nn.Module) -> str:
    """Which family a thinker belongs to."""
    return QWEN3 if model.config.model_type.startswith("qwen3") else QWEN2_5


@dataclass(frozen=True)
class Media:
    """One media item.

    Attributes:
        grids: temporal grids of the video; 0 for audio alone.
        rows, columns: merged tokens per grid.
        mel: mel frames of the sound (100 per second); 0 for a silent video.
        second_per_grid: seconds between grids.
        image: whether it is an image instead (one grid).
    """

    grids: int = 4
    rows: int = 2
    columns: int = 3
    mel: int = 0
    second_per_grid: float = 1.0
    image: bool = False

    @property
    def audio_tokens(self) -> int:
        """Of Qwen2.5."""
        return (((self.mel - 1) // 2 + 1) - 2) // 2 + 1 if self.mel else 0

    @property
    def qwen3_audio_tokens(self) -> int:
        """A second of 100 mel frames makes 13 tokens, and the rest one for every 8 begun."""
        return 13 * (self.mel // 100) + (self.mel % 100 + 7) // 8

    @property
    def frame_tokens(self) -> int:
        return self.rows * self.columns


SOUNDING = Media(mel=400)
SILENT = Media(grids=3, rows=3, columns=2)
SPEECH = Media(grids=0, mel=310)
PICTURE = Media(grids=1, image=True)


def media_tokens(item: Media, family: str = QWEN2_5) -> list[int]:
    """Token ids of one item with its start and end tokens, as the stock processor lays them out."""
    if item.image:
        return [VISION_START, *[IMAGE] * item.frame_tokens, VISION_END]
    if not item.grids:
        sound = item.qwen3_audio_tokens if family == QWEN3 else item.audio_tokens
        return [AUDIO_START, *[AUDIO] * sound, AUDIO_END]
    if item.mel and family == QWEN3:
        video = [grid * item.second_per_grid * QWEN3_IDS_PER_SECOND for grid in range(item.grids)]
        tokens = [(time, 0, VIDEO) for time in video for _ in range(item.frame_tokens)]
        tokens += [(time, 1, AUDIO) for time in range(item.qwen3_audio_tokens)]
        return [VISION_START, AUDIO_START, *[token for _, _, token in sorted(tokens)], AUDIO_END, VISION_END]
    times = [int(grid * item.second_per_grid * IDS_PER_SECOND) for grid in range(item.grids)]
    if not item.mel:
        return [VISION_START, *[VIDEO] * (item.frame_tokens * item.grids), VISION_END]
    body: list[int] = []
    last = max(times[-1], item.audio_tokens - 1)
    for window in range(last // IDS_PER_WINDOW + 1):
        inside = range(window * IDS_PER_WINDOW, (window + 1) * IDS_PER_WINDOW)
        body += [VIDEO] * (item.frame_tokens * sum(t in inside for t in times))
        body += [AUDIO] * sum(j in inside for j in range(item.audio_tokens))
    return [VISION_START, AUDIO_START, *body, AUDIO_END, VISION_END]


def tiny_inputs(
    model: nn.Module,
    samples: Sequence[Sequence[Media]],
    *,
    seed: int = 0,
    padding_side: str = "left",
    text: int = 6,
) -> dict[str, Tensor]:
    """Stock inputs of a batch, with `position_ids` [4, B, S] computed sample by sample.

    The stock flag `use_audio_in_video` holds for a whole batch, so silent and sounding videos in one batch need
    explicit positions. What a sample holds does not depend on the other samples of its batch.
    """
    rows, positions, pixels, pictures, mels = [], [], [], [], []
    family = family_of(model)
    patch = QWEN3_PATCH if family == QWEN3 else PATCH
    for items in samples:
        generator = torch.Generator().manual_seed(seed + 31 * len(items) + sum(i.mel + 7 * i.grids for i in items))
        words = torch.randint(FIRST_WORD, VOCABULARY, (len(items) + 1, text), generator=generator).tolist()
        pairs = zip(items, words[1:], strict=True)
        ids = words[0] + [token for item, tail in pairs for token in media_tokens(item, family) + tail]
        rows.append(torch.tensor(ids))
        for item in items:
            if item.grids:
                patches = item.grids * item.frame_tokens * MERGE**2
                target = pictures if item.image else pixels
                target.append(torch.randn(patches, 3 * 2 * patch**2, generator=generator))
            if item.mel:
                mels.append(torch.randn(MEL_BINS, item.mel, generator=generator))
        positions.append(_positions(model, rows[-1], items))
    length = max(len(row) for row in rows)
    place = [slice(length - len(row), length) if padding_side == "left" else slice(0, len(row)) for row in rows]
    input_ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(input_ids)
    position_ids = torch.ones(4, len(rows), length, dtype=positions[0].dtype)
    for b, (row, where) in enumerate(zip(rows, place, strict=True)):
        input_ids[b, where], mask[b, where] = row, 1
        position_ids[0, b, where] = torch.arange(len(row))
        position_ids[1:, b, where] = positions[b]
    batch = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
    return batch | _media_inputs(samples, pixels, pictures, mels)


def _media_inputs(
    samples: Sequence[Sequence[Media]], pixels: list[Tensor], pictures: list[Tensor], mels: list[Tensor]
) -> dict[str, Tensor]:
    items = [item for sample in samples for item in sample]
    batch = {}
    if pixels:
        batch["pixel_values_videos"] = torch.cat(pixels)
        batch["video_grid_thw"] = _grids(i for i in items if i.grids and not i.image)
        seconds = [i.second_per_grid for i in items if i.grids and not i.image]
        batch["video_second_per_grid"] = torch.tensor(seconds)
    if pictures:
        batch["pixel_values"] = torch.cat(pictures)
        batch["image_grid_thw"] = _grids(i for i in items if i.image)
    if mels:
        longest = max(mel.shape[1] for mel in mels)
        batch["input_features"] = torch.stack([nn.functional.pad(mel, (0, longest - mel.shape[1])) for mel in mels])
        batch["feature_attention_mask"] = torch.stack([(torch.arange(longest) < mel.shape[1]).long() for mel in mels])
    return batch


def _grids(items) -> Tensor:
    return torch.tensor([[i.grids, i.rows * MERGE, i.columns * MERGE] for i in items])


def _positions(model: nn.Module, ids: Tensor, items: Sequence[Media]) -> Tensor:
    """[3, S] by the stock method; a sample must not mix silent and sounding videos."""
    videos = [i for i in items if i.grids and not i.image]
    images = [i for i in items if i.image]
    sounds = [i.mel for i in items if i.mel]
    position_ids, _ = model.get_rope_index(
        ids[None],
        _grids(images) if images else None,
        # Without any grid the stock method takes the sample for text, sound or not.
        _grids(videos) if videos else torch.zeros(0, 3, dtype=torch.long),
        torch.ones_like(ids)[None],
        any(i.mel for i in videos),
        torch.tensor(sounds) if sounds else None,
        torch.tensor([i.second_per_grid for i in videos]) if videos else None,
    )
    return position_ids[:, 0]
