"""The model families: what can be read neither from a model's config nor from its module tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    PreTrainedModel,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from omnisieve.data.tokens import Qwen3OmniRules, TokenRules

VERSIONS = "transformers 5.17 to 5.24"

# Of an image and of a video.
_RELEASED_VISUAL_TOKENS = (151655, 151656)
RELEASED_END_TOKENS = (151645, 151643)
"""<|im_end|>, which ends an answer, and <|endoftext|>, in the vocabulary of all released models."""
RELEASED_PAD_TOKEN = 151643


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        thinker: class of the models that give logits.
        whole: class of the models that go on to speech; they have a `thinker`.
        rules: how media become tokens.
    """

    thinker: type[PreTrainedModel]
    whole: type[PreTrainedModel]
    rules: type[TokenRules]

    @property
    def model_types(self) -> tuple[str, str]:
        """`model_type` in the configs of `thinker` and of `whole`."""
        thinker, whole = (model.config_class.model_type for model in (self.thinker, self.whole))
        return thinker, whole

    def token_rules(self, config: Any) -> TokenRules:
        """The rules of a thinker's config.

        Raises:
            AttributeError: the config lacks a token id.
        """
        return self.rules(
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            audio_token_id=config.audio_token_id,
            audio_start_token_id=config.audio_start_token_id,
            audio_end_token_id=config.audio_end_token_id,
            spatial_merge_size=config.vision_config.spatial_merge_size,
            temporal_patch_size=config.vision_config.temporal_patch_size,
            ids_per_second=config.position_id_per_seconds,
            # Windows have 2 s; Qwen2.5-Omni interleaves by them and its config says so.
            seconds_per_chunk=getattr(config, "seconds_per_chunk", 2),
        )


FAMILIES = (
    Family(Qwen2_5OmniThinkerForConditionalGeneration, Qwen2_5OmniForConditionalGeneration, TokenRules),
    Family(Qwen3OmniMoeThinkerForConditionalGeneration, Qwen3OmniMoeForConditionalGeneration, Qwen3OmniRules),
)


def uses_released_tokens(config: Any) -> bool:
    """Whether a thinker's config has the media tokens of the released vocabulary, which all released models share."""
    return (config.image_token_id, config.video_token_id) == _RELEASED_VISUAL_TOKENS


def family_of(model_type: str) -> Family | None:
    """The family of a config's `model_type`, thinker or whole."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def supported_classes() -> str:
    """For messages."""
    return ", ".join(model.__name__ for family in FAMILIES for model in (family.thinker, family.whole))
