"""Where things are in a stock model: the only code that knows module trees.

Up to transformers 5.20 the towers hang from the thinker and its `model` is the decoder; later `model` holds towers and
decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omnisieve.backbones.deepstack import VISUAL, hand_over
from omnisieve.backbones.dummy_media import convolutions_called_once, with_dummies
from omnisieve.backbones.families import FAMILIES, VERSIONS, Family, supported_classes
from omnisieve.backbones.saliency import install_saliency
from omnisieve.backbones.token_maps import token_maps
from omnisieve.compressors.base import Need
from omnisieve.data.batch import Batch, Features
from omnisieve.data.tokens import TokenRules
from omnisieve.layout import Modality, TokenLayout
from omnisieve.plan import PaddingSide


class BackboneError(ValueError):
    """A model, or what it was given, cannot be compressed; the message says why and how to cure it."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A stock model with its parts resolved.

    Attributes:
        family: of the model.
        thinker: the module whose forward gives logits.
        decoder: the language model without its head.
        audio_tower, visual: the encoders.
        speaks: whether the thinker is part of a model that goes on to speech.
    """

    family: Family
    thinker: Any
    decoder: Any
    audio_tower: Any
    visual: Any
    speaks: bool = False

    @property
    def lm_head(self) -> nn.Module:
        return self.thinker.lm_head

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    @property
    def deepstack_layers(self) -> nn.ModuleList:
        """The first decoder layers, behind which visual features are added; none in most families."""
        return self.layers[: len(getattr(self.thinker.config.vision_config, "deepstack_visual_indexes", ()))]

    @property
    def embeddings(self) -> nn.Module:
        """The module that turns token ids into embeddings."""
        return self.thinker.get_input_embeddings()

    @property
    def hidden_size(self) -> int:
        return self.decoder.config.hidden_size

    @property
    def token_ids(self) -> Mapping[Modality, int]:
        """Placeholder id of each media modality."""
        config = self.thinker.config
        return {
            Modality.IMAGE: config.image_token_id,
            Modality.VIDEO: config.video_token_id,
            Modality.AUDIO: config.audio_token_id,
        }

    def token_rules(self) -> TokenRules:
        """How this model turns media into tokens.

        Raises:
            BackboneError: its config lacks a token id.
        """
        try:
            return self.family.token_rules(self.thinker.config)
        except AttributeError as error:
            raise BackboneError(f"the model's config is not complete: {error}") from error

    @torch.no_grad()
    def encode(self, batch: Batch, needs: Sequence[Need] = (), lockstep: Set[Modality] = frozenset()) -> Features:
        """Run the frozen encoders.

        Args:
            batch: with pixels and mel spectrograms. Ready `features` are returned as they are.
            needs: encoder statistics to take in the same pass; they come back in `extra` under `feature_name`.
                Deepstack features are there, too, where the model has them.
            lockstep: media that any rank encodes in this forward, where ranks wait for each other at every module
                (ZeRO-3). The encoders run for those that this batch lacks, too, and nothing of it comes back.
        """
        if batch.features is not None:
            return batch.features
        missing = lockstep - batch.to_encode
        config = self.thinker.config
        with convolutions_called_once(self.audio_tower) if lockstep else nullcontext():
            filled = with_dummies(batch, missing, config.vision_config, config.audio_config)
            return self._encode(filled, needs).without(missing)

    def _encode(self, batch: Batch, needs: Sequence[Need]) -> Features:
        extra: dict[str, Tensor] = {}
        video = image = audio = None
        if batch.pixel_values is not None:
            image = self._vision("image", batch.pixel_values, batch.image_grid_thw, extra)
        # Only now, because images have no statistics.
        with ExitStack() as hooks:
            install_saliency(
                self.audio_tower, self.visual, needs, lambda n, v: extra.update({feature_name(n): v}), hooks
            )
            if batch.pixel_values_videos is not None:
                video = self._vision("video", batch.pixel_values_videos, batch.video_grid_thw, extra)
            if batch.input_features is not None:
                audio = self.thinker.get_audio_features(
                    batch.input_features, batch.feature_attention_mask, return_dict=True
                ).last_hidden_state
        return Features(video=video, audio=audio, image=image, extra=extra)

    def _vision(self, kind: str, pixels: Tensor, grids: Tensor | None, extra: dict[str, Tensor]) -> Tensor:
        features = getattr(self.thinker, f"get_{kind}_features")(pixels, grids, return_dict=True)
        for place, name in enumerate(self.deepstack_names(kind)):
            rows = features.deepstack_features[place]
            # Older versions do not split them by item.
            extra[name] = rows if isinstance(rows, Tensor) else torch.cat(list(rows))
        return torch.cat(list(features.pooler_output))

    def merge(self, input_ids: Tensor, features: Features) -> Tensor:
        """Embeddings [B, S, D] with media features at their placeholders.

        Args:
            input_ids: [B, S].
            features: rows in sequence order, as many as there are placeholders.
        """
        embeds = self.embeddings(input_ids)
        rows = {Modality.IMAGE: features.image, Modality.VIDEO: features.video, Modality.AUDIO: features.audio}
        for modality, token_id in self.token_ids.items():
            values = rows[modality]
            if values is not None:
                place = (input_ids == token_id).unsqueeze(-1)
                embeds = embeds.masked_scatter(place, values.to(embeds.device, embeds.dtype))
        return embeds

    def deepstack(self, features: Features, layout: TokenLayout) -> AbstractContextManager[None]:
        """A context in which prompts of merged embeddings bring their deepstack features along.

        Args:
            features: what was merged.
            layout: of the batch.

        Raises:
            BackboneError: the features were cached without those of deepstack.
        """
        if not self.deepstack_layers or not layout.counts(*VISUAL).any():
            return nullcontext()
        image, video = (self._deepstack(features, kind, layout) for kind in VISUAL)
        return hand_over(self.decoder, image, video, layout)

    def deepstack_names(self, kind: str) -> list[str]:
        """What the deepstack features of each layer are called in `Features.extra`; `kind` is "video" or "image"."""
        return [f"{kind}/deepstack.{place}" for place in range(len(self.deepstack_layers))]

    def _deepstack(self, features: Features, modality: Modality, layout: TokenLayout) -> list[Tensor]:
        """[N, D] for each deepstack layer; nothing where a batch has no such token."""
        if not layout.counts(modality).any():
            return []
        names = self.deepstack_names(modality.name.lower())
        if missing := [name for name in names if name not in features.extra]:
            raise BackboneError(f"the cached features hold no {missing}, which this model needs: cache them again")
        return [features.extra[name] for name in names]

    def needs(self, features: Features, layout: TokenLayout, needs: Sequence[Need]) -> dict[Need, Tensor]:
        """Encoder statistics of `features` arranged to [B, S, ...]; zeros where a batch has no such token.

        Raises:
            BackboneError: the features were cached without a statistic that is needed.
        """
        found = {}
        for need in needs:
            values = features.extra.get(feature_name(need))
            if values is None and layout.counts(need.modality).any():
                raise BackboneError(
                    f"the cached features hold no {feature_name(need)!r}, which this compressor needs: cache them "
                    f"again for it (they hold {sorted(features.extra) or 'no statistics'})"
                )
            found[need] = arrange(values, need, layout)
        return found

    def layout(
        self, input_ids: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None = None
    ) -> TokenLayout:
        """What each token of a batch is, for calls that bring no layout: one copy from the device.

        Args:
            input_ids: [B, S].
            position_ids: [3, B, S] rope ids, or [4, B, S] with the sequence's own first; may be None without media.
                Fractions of ids (Qwen3-Omni) are cut off.
            attention_mask: [B, S], 0 in padding; None without padding.

        Raises:
            BackboneError: positions are missing, or padding is not on one side.
        """
        present = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
        rope = None if position_ids is None or position_ids.dim() < 3 else position_ids[-3:]
        parts = [input_ids[None], present[None]] + ([] if rope is None else [rope])
        host = torch.cat(parts).cpu().numpy()  # float32 with fractional positions, which holds any id exactly
        ids, present_host = host[0], host[1] != 0
        positions = np.zeros((3, *ids.shape), dtype=np.int64) if rope is None else host[2:]
        modality = np.where(present_host, int(Modality.TEXT), int(Modality.PADDING))
        for kind, token_id in self.token_ids.items():
            modality[present_host & (ids == token_id)] = kind
        if rope is None and (modality >= Modality.IMAGE).any():
            raise BackboneError(
                "media tokens without rope positions [3, B, S]: pass attention_mask beside input_ids, from which the "
                "model computes them, or pass position_ids"
            )
        side: PaddingSide = "right" if present_host[:, 0].all() else "left"
        layout = TokenLayout.stack(
            token_maps(modality, positions),
            length=ids.shape[1],
            padding_side=side,
            ids_per_window=self.token_rules().ids_per_chunk,
        )
        if (layout.modality != modality).any():
            raise BackboneError("the batch has padding inside a sequence or on both sides; pad on one side")
        return layout.to(input_ids.device)


def feature_name(need: Need) -> str:
    """Name of a statistic in `Features.extra`."""
    return f"{need.modality.name.lower()}/{need.kind}.{need.span}"


def arrange(values: Tensor | None, need: Need, layout: TokenLayout) -> Tensor:
    """Values of one modality's tokens in batch order as [B, S, ...]; 0 elsewhere.

    Args:
        values: [N, ...]; not read if the batch has no token of the modality, when the width of keys becomes 1.
        need: what they are.
        layout: of the batch, with N tokens of the modality.

    Raises:
        BackboneError: values of other tokens.
    """
    flat = np.flatnonzero(layout.modality == need.modality)
    shape = (layout.batch_size, layout.length)
    if values is None or not len(flat):
        width = (1,) if need.kind == "keys" else ()
        return torch.zeros(*shape, *width, device=layout.device)
    if len(flat) != len(values):
        raise BackboneError(f"{len(values)} values for {len(flat)} {need.modality.name.lower()} tokens")
    index = torch.from_numpy(flat).to(layout.device, non_blocking=True)
    out = torch.zeros(layout.batch_size * layout.length, *values.shape[1:], device=layout.device)
    return out.index_copy(0, index, values.to(out.device, out.dtype)).unflatten(0, shape)


def adapter_for(model: nn.Module) -> Adapter:
    """Resolve a model's parts.

    Args:
        model: a thinker of Qwen2.5-Omni or Qwen3-Omni, the whole model (its thinker is meant), or either of them
            wrapped by peft.

    Raises:
        BackboneError: another model.
    """
    base: Any = model
    if hasattr(base, "get_base_model"):  # peft
        base = base.get_base_model()
    for family in FAMILIES:
        speaks = False
        if isinstance(base, family.whole):
            base, speaks = base.thinker, bool(base.has_talker)
        if isinstance(base, family.thinker):
            inner = base.model
            towers, decoder = (inner, inner.language_model) if hasattr(inner, "language_model") else (base, inner)
            return Adapter(family, base, decoder, towers.audio_tower, towers.visual, speaks)
    raise BackboneError(
        f"{type(model).__name__} is not supported; supported are {supported_classes()} of {VERSIONS}, also wrapped by "
        "peft"
    )
