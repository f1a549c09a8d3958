"""Where a run's batches come from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from omnisieve.compressors import Compressor
from omnisieve.compressors.base import Settings
from omnisieve.config import DataSection, TrainSection
from omnisieve.data.batch import Batch
from omnisieve.data.collate import collate
from omnisieve.data.dataset import MediaLoader, OmniDataset
from omnisieve.data.length_limit import LengthLimit
from omnisieve.data.manifest import Manifest
from omnisieve.data.media import MediaReader
from omnisieve.data.read_ahead import ReadAhead
from omnisieve.data.sampler import StreamSampler
from omnisieve.data.sizes import check_sizes, read_sizes, sizes_in_training
from omnisieve.layout import Modality
from omnisieve.training.distributed import Ranks
from omnisieve.training.interruption import ignore_signals
from omnisieve.training.pictures import ClipMedia, clip_media
from omnisieve.training.reach import Reach, drawn


@dataclass(frozen=True)
class Streams:
    """Batches of one rank.

    Attributes:
        train: iterates from the sampler's position, without end.
        sampler: the order of `train`; told by the trainer what has been trained on.
        val: this rank's share of the validation split; None without one. Every rank has as many batches as the
            others; beside a batch stands whether it counts, or only keeps step with the others.
        probes: clips of `val` that are looked at more closely, by id, each with a way to decode it.
        rounding: the dtype that cached features were rounded to; None if they are what the encoders give.
        reading: how media are read, JSON values; what decides the encoders' outputs beside their weights.
    """

    train: Iterable[Batch]
    sampler: StreamSampler
    val: Iterable[tuple[Batch, bool]] | None = None
    probes: Mapping[str, Callable[[], ClipMedia]] = field(default_factory=dict)
    rounding: str | None = None
    reading: Mapping[str, Any] = field(default_factory=dict)


def check_manifests(data: DataSection, train: TrainSection) -> list[str]:
    """Read the manifests and look for their media files, which is quick; everything after it is not.

    Returns:
        what a run should say of them, see `Manifest.check`.

    Raises:
        ManifestError: a line is wrong, or files are missing. DataError: `train.group_by_length` is about other data.
    """
    found = [remark for path in (data.train, data.val) if path is not None for remark in Manifest(path).check()]
    if train.group_by_length is not None:
        check_sizes(Path(train.group_by_length), Path(data.train))
    return found


def open_streams(
    data: DataSection, train: TrainSection, media: MediaLoader, compressor: Compressor, ranks: Ranks
) -> Streams:
    """Read the manifests and lay their clips out for this rank.

    Samples that `compressor` cannot bring to its ratio are replaced as those that cannot be read.

    Raises:
        ManifestError: a manifest cannot be used. DataError: `train.group_by_length` holds sizes of other data.
    """
    place = {"rank": ranks.rank, "world_size": ranks.world_size}
    limit = None if data.max_tokens is None else LengthLimit(data.max_tokens, lower_fps=data.too_long == "lower_fps")
    ids_per_window = media.preprocessor.rules.ids_per_chunk
    reach = Reach(drawn(compressor, train.ratio), ids_per_window)
    dataset = OmniDataset(Manifest(data.train), media, on_error="replace", limit=limit, check=reach)
    lengths = None
    if train.group_by_length is not None:
        sizes = read_sizes(Path(train.group_by_length), Path(data.train), media.preprocessing(""))
        lengths = lengths_in_llm(sizes_in_training(sizes, limit), compressor.settings, train)
    sampler = StreamSampler(
        len(dataset),
        train.micro_batch_size,
        seed=train.seed,
        accumulation=train.gradient_accumulation_steps,
        lengths=lengths,
        **place,
    )
    val, probes = None, dict[str, Callable[[], ClipMedia]]()
    if data.val is not None:
        reach = Reach([compressor], ids_per_window)
        held_out = OmniDataset(Manifest(data.val), media, on_error="replace", limit=limit, check=reach)
        shards = val_shards(len(held_out), train.micro_batch_size, **place)
        counts = [counted for _, counted in shards]
        val = _Counted(_loader(held_out, [indices for indices, _ in shards], data, train, ranks), counts)
        probes = probe_clips(held_out, train.probe_clips)
    rounding = None if media.cache is None else media.cache.rounding
    reading = media.preprocessing("")
    return Streams(_loader(dataset, sampler, data, train, ranks), sampler, val, probes, rounding, reading)


def lengths_in_llm(sizes: np.ndarray, settings: Settings, train: TrainSection) -> np.ndarray:
    """Tokens of each sample that the LLM sees in training, [n], on average where they are drawn.

    Args:
        sizes: [n, 3] tokens before compression: text and images, video, audio.
        settings: of the compressor.
        train: its route, and the range of its ratio.
    """
    fixed, video, audio = sizes.T
    ratio = settings.retained_ratio
    if train.ratio.min is not None and train.ratio.max is not None:
        ratio = (train.ratio.min + train.ratio.max) / 2
    if ratio is not None:
        kept = ratio * (video + audio)
    else:
        kept = settings.ratio_of(Modality.VIDEO) * video + settings.ratio_of(Modality.AUDIO) * audio
    stay = train.estimator.candidates if train.estimator.route == "masked" else 0.0
    return fixed + kept + stay * (video + audio - kept)


def val_shards(size: int, batch_size: int, *, rank: int, world_size: int) -> list[tuple[list[int], bool]]:
    """One rank's batches of a pass over `size` clips, each with whether it counts.

    Batches go round the ranks; a rank that has none left in the last round repeats the first, uncounted.
    """
    batches = [list(range(i, min(i + batch_size, size))) for i in range(0, size, batch_size)]
    rounds = -(-len(batches) // world_size)
    places = range(rank, rounds * world_size, world_size)
    return [(batches[place], True) if place < len(batches) else (batches[0], False) for place in places]


def probe_clips(dataset: OmniDataset, count: int) -> dict[str, Callable[[], ClipMedia]]:
    """The first clips by id, each with a way to decode it, also where the dataset reads from a feature cache."""
    decoding, loader = copy.copy(dataset), copy.copy(dataset.loader)
    loader.cache, loader.reader = None, MediaReader(decode_seconds=loader.reader.decode_seconds)
    decoding.loader, decoding.on_error = loader, "raise"

    def decode(index: int) -> ClipMedia:
        try:
            return clip_media(decoding[index], loader.preprocessor)
        finally:
            loader.reader.close()

    return {dataset.conversations[i].id: partial(decode, i) for i in range(min(count, len(dataset)))}


def closable(batches: Iterable[Batch]) -> Generator[Batch, None, None]:
    """An iterator whose `close` ends the workers behind it."""
    yield from batches


@dataclass(frozen=True)
class _Counted:
    batches: Iterable[Batch]
    counts: Sequence[bool]

    def __iter__(self) -> Iterator[tuple[Batch, bool]]:
        return zip(self.batches, self.counts, strict=True)


def _loader(
    dataset: OmniDataset, batches: Iterable[list[int]], data: DataSection, train: TrainSection, ranks: Ranks
) -> Iterable[Batch]:
    preprocessor = dataset.loader.preprocessor
    return ReadAhead(
        dataset,
        batches,
        num_workers=data.workers,
        recycle_after=-(-data.recycle_after // train.micro_batch_size),
        collate_fn=partial(
            collate,
            pad_token_id=preprocessor.tokenizer.pad_token_id,
            ids_per_window=preprocessor.rules.ids_per_chunk,
        ),
        pin_memory=ranks.device.type != "cpu",
        worker_init_fn=ignore_signals,
    )
