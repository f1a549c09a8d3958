"""What the data side must know of a model, handed to it: token rules, processors, and which encoders made a cache."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn
from transformers import AutoProcessor, ProcessorMixin

from omnisieve.backbones.adapter import Adapter, BackboneError
from omnisieve.backbones.loading import config_of, whole, without_token_warnings
from omnisieve.backbones.protocols import protocol_of
from omnisieve.config import MediaSection
from omnisieve.data.dataset import MediaLoader
from omnisieve.data.feature_cache import FeatureCache
from omnisieve.data.feature_shards import INDEX, FeatureCacheError
from omnisieve.data.preprocess import Preprocessor

# Values of each encoder tensor that enter its fingerprint.
_SAMPLED = 64


def media_loader(path: str | Path, adapter: Adapter, media: MediaSection, *, use_cache: bool = True) -> MediaLoader:
    """The reader of media files for a model.

    Args:
        path: folder or name of the model, which also holds its processor.
        adapter: of the loaded model.
        media: how to sample; `feature_cache` names the cache to read from.
        use_cache: False decodes even if there is a cache.

    Raises:
        BackboneError: the folder holds no processor.
        ConfigError: see `protocol_of`.
        FeatureCacheError: the cache was made with other settings or encoders.
    """
    loader = reader(load_processor(path), adapter, media)
    if use_cache and media.feature_cache is not None:
        loader.cache = FeatureCache(media.feature_cache, loader.preprocessing(encoder_fingerprint(adapter)))
    return loader


def reader(processor: ProcessorMixin, adapter: Adapter, media: MediaSection) -> MediaLoader:
    """The reader of media files for a model with this processor, without a cache."""
    rules, protocol = adapter.token_rules(), protocol_of(media, adapter.thinker.config, processor)
    preprocessor = Preprocessor(
        processor,
        rules,
        min_pixels=protocol.min_pixels,
        max_pixels=protocol.max_pixels,
        total_pixels=protocol.total_pixels,
        image_pixels=(protocol.min_image_pixels, protocol.max_image_pixels),
        pixel_dtype=adapter.visual.dtype,
    )
    return MediaLoader(
        preprocessor,
        fps=protocol.fps,
        min_frames=protocol.min_frames,
        max_frames=protocol.max_frames,
        placement=protocol.placement,
        audio_seconds=media.audio.max_seconds,
        decode_seconds=media.decode_seconds,
    )


def check_media(path: str | Path, media: MediaSection) -> None:
    """Look for what `media_loader` needs beside the model; how a cache was made, only the encoders can tell.

    Raises:
        BackboneError: the folder holds no processor.
        ConfigError: the keys contradict the protocol.
        FeatureCacheError: there is no finished cache.
    """
    protocol_of(media, config_of(path), load_processor(path))
    if media.feature_cache is not None and not (Path(media.feature_cache) / INDEX).is_file():
        raise FeatureCacheError(
            f"data.feature_cache: {media.feature_cache} holds no finished feature cache; make it with "
            "tools/cache_features.py, or set data.feature_cache=null to decode and encode every time"
        )


def load_processor(path: str | Path) -> ProcessorMixin:
    """The stock processor of a model.

    Raises:
        BackboneError: the folder holds none.
    """
    try:
        with without_token_warnings():
            return AutoProcessor.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"{path} holds no processor ({error}); copy the processor's files beside the weights"
        ) from error


def encoder_fingerprint(adapter: Adapter) -> str:
    """Identifies the encoders' weights and precision, from a sample of every tensor.

    Training changes every tensor, so a sample tells two trainings apart without reading gigabytes.
    """
    digest = hashlib.sha256()
    for tower in (adapter.audio_tower, adapter.visual):
        _add(digest, tower)
    return digest.hexdigest()[:16]


def _add(digest: hashlib._Hash, tower: nn.Module) -> None:
    for name, value in sorted(tower.named_parameters()):
        with whole(value):
            flat = value.detach().flatten()
            sample = flat[:: max(flat.numel() // _SAMPLED, 1)][:_SAMPLED].to("cpu", torch.float32).contiguous()
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(sample.numpy().tobytes())
