"""Run the frozen encoders once over all media of a recipe's manifests and keep what they say.

    python tools/cache_features.py --config recipes/quickstart.yaml

Writes `data.feature_cache`, from which training then reads instead of decoding. A file that cannot be read is named
and left out; training replaces it as it would without a cache. A cache that is there and was made the same way is
kept as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from omnisieve.backbones import BackboneError, adapter_for, load_backbone
from omnisieve.backbones.media import encoder_fingerprint, media_loader
from omnisieve.config import ConfigError, TrainConfig, load_config
from omnisieve.data.collate import collate
from omnisieve.data.dataset import LoadedMedium, MediaLoader
from omnisieve.data.errors import DataError
from omnisieve.data.feature_cache import INDEX, FeatureCache, FeatureCacheError, FeatureCacheWriter
from omnisieve.data.manifest import Conversation, Manifest, MediaPart
from omnisieve.data.media import MediaError
from omnisieve.data.read_ahead import ReadAhead


class MediaFiles(Dataset[tuple[MediaPart, LoadedMedium | MediaError]]):
    """Decodes and preprocesses, in worker processes."""

    def __init__(self, parts: Sequence[MediaPart], loader: MediaLoader) -> None:
        self.parts, self.loader = parts, loader

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> tuple[MediaPart, LoadedMedium | MediaError]:
        part = self.parts[index]
        try:
            return part, self.loader.load_part(part)
        except MediaError as error:
            return part, error


def main(argv: list[str]) -> int:
    """Cache the media of `data.train` and `data.val`."""
    config = load_config(TrainConfig, argv)
    folder = config.data.feature_cache
    if folder is None:
        raise ConfigError("data.feature_cache is not set: name the folder to write")
    backbone = load_backbone(config.model.path, config.model.dtype, config.model.attn_implementation)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    adapter = adapter_for(backbone.to(device))
    loader = media_loader(config.model.path, adapter, config.data, use_cache=False)
    preprocessing = loader.preprocessing(encoder_fingerprint(adapter))
    parts = media_of([config.data.train, config.data.val])
    if is_complete(folder, preprocessing, parts):
        print(f"{folder} holds all {len(parts)} files already")
        return 0
    files: ReadAhead[tuple[MediaPart, LoadedMedium | MediaError]] = ReadAhead(
        MediaFiles(parts, loader), batch_size=None, num_workers=config.data.workers
    )
    failed: list[MediaError] = []
    dtype = getattr(torch, config.model.dtype)
    with FeatureCacheWriter(folder, preprocessing, dtype=dtype) as cache:
        for part, medium in tqdm(files, total=len(parts), desc="encode", unit="file"):
            if isinstance(medium, MediaError):
                failed.append(medium)
                cache.leave_out(part, medium)
                continue
            sample = loader.sample(Conversation.alone(part), [medium])
            batch = collate([sample], pad_token_id=loader.preprocessor.tokenizer.pad_token_id).to(device)
            cache.add(part, medium.run, adapter.encode(batch))
    for error in failed:
        print(error, file=sys.stderr)
    print(f"{folder}: {len(parts) - len(failed)} files cached, {len(failed)} could not be read")
    return 0


def media_of(manifests: Sequence[str | None]) -> list[MediaPart]:
    """Every medium of some manifests, once."""
    found = (part for path in manifests if path for conversation in Manifest(path) for part in conversation.media)
    return list(dict.fromkeys(found))


def is_complete(folder: str, preprocessing: dict, parts: Sequence[MediaPart]) -> bool:
    """Whether a cache made the same way holds all the files that can be read.

    Raises:
        FeatureCacheError: a cache is there that was made in another way, or lacks files.
    """
    if not (Path(folder) / INDEX).is_file():
        return False
    cache = FeatureCache(folder, preprocessing)
    missing = sum(not cache.covers(part) for part in parts)
    if missing:
        raise FeatureCacheError(f"{folder} lacks {missing} of {len(parts)} files; remove it to cache again")
    return True


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (BackboneError, ConfigError, DataError) as error:
        sys.exit(f"cache_features.py: {error}")
