"""Run the frozen encoders once over all media of a recipe's manifests and keep what they say.

    python tools/cache_features.py --config recipes/quickstart.yaml
    torchrun --nproc_per_node 8 tools/cache_features.py --config recipes/omnisift_qwen2_5_omni_7b.yaml \
        data.train=my.jsonl data.feature_cache=cache/my_data
    python tools/cache_features.py --config recipes/eval_testbed.yaml data.feature_cache=runs/testbed/test_features

Writes `data.feature_cache`, from which training or evaluation then reads instead of decoding, with the encoder
statistics that the recipe's compressor or methods need. Of N processes, each takes every N-th file; all must see the
folder. A run that was cut short is gone on with by the same command, also with another number of processes: at most a
shard of each process (1 GiB) is encoded again. Files that a manifest has gained are added, and so are statistics, for
which the encoders run again. A file that cannot be read is named and left out; it is then treated as it would be
without a cache. Formats and sizes: docs/feature_cache.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from tqdm import tqdm

from omnisieve.backbones import adapter_for, feature_name, load_backbone
from omnisieve.backbones.media import encoder_fingerprint, media_loader
from omnisieve.compressors import Compressor, UnreachableRatioError
from omnisieve.compressors.base import Need
from omnisieve.config import ConfigError, EvalConfig, TrainConfig, load_config, read_yaml
from omnisieve.data.batch import Features
from omnisieve.data.collate import collate
from omnisieve.data.dataset import LoadedMedium, MediaLoader
from omnisieve.data.feature_cache import media_key
from omnisieve.data.feature_shards import Origin, remove_remains
from omnisieve.data.feature_writer import FeatureCacheWriter
from omnisieve.data.manifest import Conversation, Manifest, MediaPart
from omnisieve.data.media import MediaError
from omnisieve.data.progress import Progress
from omnisieve.data.read_ahead import ReadAhead
from omnisieve.evaluation.methods import resolve_methods
from omnisieve.method_help import describe_methods
from omnisieve.training.build import USER_ERRORS, make_compressor
from omnisieve.training.distributed import divide_threads, leave
from omnisieve.training.errors import TrainingError

SHARD_BYTES = 1 << 30
# Files after which a decoding process is replaced, which gives back what libraries leaked.
RECYCLE_AFTER = 1000
# Of the one exchange between processes, at the start, for which the first may have to tidy up a large folder.
WAIT = timedelta(hours=1)


@dataclass(frozen=True)
class Process:
    """This process in its run.

    Attributes:
        rank, world_size: of all processes.
        device: where it encodes.
        run: a name that no other run has.
    """

    rank: int
    world_size: int
    device: torch.device
    run: str


@dataclass(frozen=True)
class Medium:
    """A media file on its way into the cache; `loaded` is None if it is there already, `error` is why it cannot be."""

    part: MediaPart
    key: str | None = None
    loaded: LoadedMedium | None = None
    error: MediaError | None = None


class MediaFiles(Dataset[Medium]):
    """Decodes and preprocesses what a cache lacks, in worker processes."""

    def __init__(self, parts: Sequence[MediaPart], loader: MediaLoader, cache: FeatureCacheWriter) -> None:
        self.parts, self.loader, self.cache = parts, loader, cache

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Medium:
        part = self.parts[index]
        key = None
        try:
            key = media_key(part)
            if fault := self.cache.contents.fault(key):
                raise MediaError(str(part.path), *fault)
            return Medium(part, key, self.loader.load_part(part) if self.cache.lacks(key) else None)
        except MediaError as error:
            return Medium(part, key, error=error)


def main(argv: list[str]) -> int:
    """Cache the media of `data.train` and `data.val`, or of an evaluation's manifest."""
    config = load_recipe(argv)
    if config.data.feature_cache is None:
        raise ConfigError("data.feature_cache is not set: name the folder to write")
    return fill(config, join(Path(config.data.feature_cache)))


def join(folder: Path) -> Process:
    """Find this process's place among those that the launcher started; without a launcher it is alone.

    The first removes what a killed run left in the folder, before any process writes.
    """
    divide_threads()
    rank, world_size, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    run = [uuid.uuid4().hex[:12]]
    if rank == 0:
        remove_remains(folder)
    if world_size > 1:
        dist.init_process_group("gloo", timeout=WAIT)
        dist.broadcast_object_list(run)
        dist.destroy_process_group()
    return Process(rank, world_size, find_device(local_rank), run[0])


def find_device(local_rank: int) -> torch.device:
    """The accelerator of a process, or the CPU where there is none.

    Raises:
        TrainingError: there are fewer accelerators than processes.
    """
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise TrainingError(
            f"process {local_rank} of this machine has no accelerator, there are {count}: start as many processes as "
            f"there are accelerators (torchrun --nproc_per_node {count})"
        )
    torch.accelerator.set_device_index(local_rank)
    return torch.device(torch.accelerator.current_accelerator().type, local_rank)


def fill(config: TrainConfig | EvalConfig, process: Process) -> int:
    """Encode this process's share; the first one then waits for the others and writes the index."""
    if process.rank == 0:
        for manifest, limit in manifests_of(config):
            for remark in manifest.check(limit, files=False):
                print(remark, file=sys.stderr)
    model = config.model
    adapter = adapter_for(
        load_backbone(
            model.path, model.dtype, model.attn_implementation, process.device, model.encoder_attn_implementation
        )
    )
    loader = media_loader(config.model.path, adapter, config.data, use_cache=False)
    needs = list(dict.fromkeys(n for c in compressors_of(config, adapter.hidden_size) for n in c.needs))
    cache = open_cache(config, process, loader.preprocessing(encoder_fingerprint(adapter)), needs)
    progress = Progress(cache.staging, process.rank, process.world_size)
    parts = media_of(config)
    share = parts[process.rank :: process.world_size]
    files: ReadAhead[Medium] = ReadAhead(
        MediaFiles(share, loader, cache), num_workers=config.data.workers, recycle_after=RECYCLE_AFTER
    )

    def encode(medium: Medium) -> Features:
        sample = loader.sample(Conversation.alone(medium.part), [medium.loaded])
        batch = collate([sample], pad_token_id=loader.preprocessor.tokenizer.pad_token_id)
        return adapter.encode(batch.to(process.device), needs)

    with tqdm(total=len(parts), desc="features", unit="file", disable=process.rank > 0) as bar:
        encoded, errors = 0, []
        for done, medium in enumerate(files, start=1):
            encoded += keep(medium, cache, encode)
            errors += [str(medium.error)] if medium.error else []
            progress.report(done)
            bar.update(progress.total - bar.n)
        progress.finish(len(share), {"shards": cache.close(), "encoded": encoded, "errors": errors})
        if process.rank > 0:
            return 0
        while (results := progress.results()) is None:
            bar.update(progress.total - bar.n)
            time.sleep(1)
        bar.update(progress.total - bar.n)
    cache.finish([name for result in results for name in result["shards"]])
    print_summary(cache.folder, len(parts), results)
    return 0


def open_cache(
    config: TrainConfig | EvalConfig, process: Process, preprocessing: dict[str, Any], needs: Sequence[Need]
) -> FeatureCacheWriter:
    """The cache to fill, as this process writes to it.

    Raises:
        FeatureCacheError: it was made with other settings.
    """
    stored = config.data.feature_cache_dtype or config.model.dtype
    return FeatureCacheWriter(
        config.data.feature_cache,
        Origin(preprocessing, encoded=config.model.dtype, stored=stored),
        statistics=[feature_name(need) for need in needs],
        run=process.run,
        rank=process.rank,
        shard_bytes=SHARD_BYTES,
    )


def keep(medium: Medium, cache: FeatureCacheWriter, encode: Callable[[Medium], Features]) -> bool:
    """Put what is new about a file into the cache; returns whether it was encoded."""
    if medium.error is not None:
        if medium.key is not None:  # else it is missing or empty, and looking it up says so
            cache.leave_out(medium.key, medium.error)
        return False
    # Of two files with the same content, one is enough.
    if medium.loaded is None or not cache.lacks(medium.key):
        return False
    cache.add(medium.part, medium.key, medium.loaded.run, encode(medium))
    return True


def print_summary(folder: Path, count: int, results: Sequence[dict[str, Any]]) -> None:
    """Name the files that could not be read, and count the others."""
    errors = [error for result in results for error in result["errors"]]
    for error in errors:
        print(error, file=sys.stderr)
    encoded = sum(result["encoded"] for result in results)
    print(
        f"{folder}: {encoded} files encoded, {count - encoded - len(errors)} were there already, "
        f"{len(errors)} could not be read"
    )


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
    clips = (clip for manifest, limit in manifests_of(config) for clip in manifest[:limit])
    return list(dict.fromkeys(part for clip in clips for part in clip.media))


def manifests_of(config: TrainConfig | EvalConfig) -> list[tuple[Manifest, int | None]]:
    """The recipe's manifests, each with the number of its lines that count; None: all."""
    if isinstance(config, EvalConfig):
        return [(Manifest(config.manifest), config.limit)]
    return [(Manifest(path), None) for path in (config.data.train, config.data.val) if path]


def compressors_of(config: TrainConfig | EvalConfig, hidden_size: int) -> Iterator[Compressor]:
    """What the recipe will run."""
    if isinstance(config, TrainConfig):
        yield make_compressor(config, hidden_size)
        return
    for method in resolve_methods(config.entries, config.settings, config.plugins):
        for ratio in method.ratios(config.ratios):
            with suppress(UnreachableRatioError):  # a row without answers, in an evaluation
                yield method.build(ratio)


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except USER_ERRORS as error:
        print(f"cache_features.py: {error}", file=sys.stderr)
        status = 1
    # A process that aborts at its exit would take the others along.
    leave(status)
