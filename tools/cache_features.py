"""Run the frozen encoders once over all media of a recipe's manifests and keep what they say.

    python tools/cache_features.py --config recipes/quickstart.yaml
    python tools/cache_features.py --config recipes/eval_testbed.yaml data.feature_cache=runs/testbed/test_features

Writes `data.feature_cache`, from which training or evaluation then reads instead of decoding, with the encoder
statistics that the recipe's compressor or methods need. A file that cannot be read is named and left out; it is then
treated as it would be without a cache. A cache that is there and was made the same way is kept as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from omnisieve.backbones import BackboneError, adapter_for, feature_name, load_backbone
from omnisieve.backbones.media import encoder_fingerprint, media_loader
from omnisieve.compressors import Compressor, CompressorError, UnreachableRatioError
from omnisieve.config import ConfigError, EvalConfig, TrainConfig, load_config, read_yaml
from omnisieve.data.collate import collate
from omnisieve.data.dataset import LoadedMedium, MediaLoader
from omnisieve.data.errors import DataError
from omnisieve.data.feature_cache import INDEX, FeatureCache, FeatureCacheError, FeatureCacheWriter
from omnisieve.data.manifest import Conversation, Manifest, MediaPart
from omnisieve.data.media import MediaError
from omnisieve.data.read_ahead import ReadAhead
from omnisieve.evaluation.methods import resolve_methods
from omnisieve.method_help import describe_methods
from omnisieve.training.build import make_compressor


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
    """Cache the media of `data.train` and `data.val`, or of an evaluation's manifest."""
    config = load_recipe(argv)
    folder = config.data.feature_cache
    if folder is None:
        raise ConfigError("data.feature_cache is not set: name the folder to write")
    backbone = load_backbone(config.model.path, config.model.dtype, config.model.attn_implementation)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    adapter = adapter_for(backbone.to(device))
    loader = media_loader(config.model.path, adapter, config.data, use_cache=False)
    preprocessing = loader.preprocessing(encoder_fingerprint(adapter))
    parts = media_of(config)
    needs = list(dict.fromkeys(n for c in compressors_of(config, adapter.hidden_size) for n in c.needs))
    statistics = [feature_name(need) for need in needs]
    if is_complete(folder, preprocessing, parts, statistics):
        print(f"{folder} holds all {len(parts)} files already")
        return 0
    files: ReadAhead[tuple[MediaPart, LoadedMedium | MediaError]] = ReadAhead(
        MediaFiles(parts, loader), num_workers=config.data.workers
    )
    failed: list[MediaError] = []
    dtype = getattr(torch, config.model.dtype)
    with FeatureCacheWriter(folder, preprocessing, statistics=statistics, dtype=dtype) as cache:
        for part, medium in tqdm(files, total=len(parts), desc="encode", unit="file"):
            if isinstance(medium, MediaError):
                failed.append(medium)
                cache.leave_out(part, medium)
                continue
            sample = loader.sample(Conversation.alone(part), [medium])
            batch = collate([sample], pad_token_id=loader.preprocessor.tokenizer.pad_token_id).to(device)
            cache.add(part, medium.run, adapter.encode(batch, needs))
    for error in failed:
        print(error, file=sys.stderr)
    print(f"{folder}: {len(parts) - len(failed)} files cached, {len(failed)} could not be read")
    return 0


def load_recipe(argv: list[str]) -> TrainConfig | EvalConfig:
    """The configuration; a recipe with `methods` is one of evaluation."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    path = parser.parse_known_args(argv)[0].config
    evaluation = path is not None and "methods" in read_yaml(path)
    schema = EvalConfig if evaluation else TrainConfig
    return load_config(schema, argv, description=__doc__, method_help=describe_methods)


def media_of(config: TrainConfig | EvalConfig) -> list[MediaPart]:
    """Every medium of the recipe's manifests, once."""
    if isinstance(config, TrainConfig):
        clips = [clip for path in (config.data.train, config.data.val) if path for clip in Manifest(path)]
    else:
        clips = Manifest(config.manifest)[: config.limit]
    return list(dict.fromkeys(part for clip in clips for part in clip.media))


def compressors_of(config: TrainConfig | EvalConfig, hidden_size: int) -> Iterator[Compressor]:
    """What the recipe will run."""
    if isinstance(config, TrainConfig):
        yield make_compressor(config, hidden_size)
        return
    for method in resolve_methods(config.entries, config.settings, config.plugins):
        for ratio in method.ratios(config.ratios):
            with suppress(UnreachableRatioError):  # a row without answers, in an evaluation
                yield method.build(ratio)


def is_complete(folder: str, preprocessing: dict, parts: Sequence[MediaPart], statistics: Sequence[str]) -> bool:
    """Whether a cache made the same way holds all the files that can be read, with these statistics.

    Raises:
        FeatureCacheError: a cache is there that was made in another way, or lacks files or statistics.
    """
    if not (Path(folder) / INDEX).is_file():
        return False
    cache = FeatureCache(folder, preprocessing)
    missing = sum(not cache.covers(part) for part in parts)
    if missing:
        raise FeatureCacheError(f"{folder} lacks {missing} of {len(parts)} files; remove it to cache again")
    absent = sorted(set(statistics) - set(cache.statistics))
    if absent:
        raise FeatureCacheError(f"{folder} lacks the statistics {', '.join(absent)}; remove it to cache again")
    return True


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (BackboneError, CompressorError, ConfigError, DataError) as error:
        sys.exit(f"cache_features.py: {error}")
