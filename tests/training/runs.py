"""Short training runs on a tiny random thinker and batches in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from omnisieve.backbones import Estimator, adapter_for, load_backbone
from omnisieve.compressors import build_compressor
from omnisieve.config import DataSection, ModelSection, TrainConfig, TrainSection
from omnisieve.data.batch import BadSample, Batch, Features
from omnisieve.data.dataset import substitute
from omnisieve.data.sampler import StreamSampler
from omnisieve.training.build import make_teacher, make_trainable
from omnisieve.training.distributed import Ranks
from omnisieve.training.engine import sharded_loading
from omnisieve.training.objective import TrainingModule
from omnisieve.training.streams import Streams
from omnisieve.training.trainer import Trainer
from tests.models import HIDDEN, QWEN2_5, tiny_thinker
from tests.training.batches import CLIPS, make_batch, with_features
from tests.training.clips import probes_of

OMNISIFT = {"method": "omnisift", "retained_ratio": 0.25, "width": 16, "heads": 2, "pruner_channels": 8}
VAL_BATCHES = 3  # an odd number: of two ranks, one has nothing left in the last round


@dataclass
class Alone:
    """The only rank, without a process group."""

    rank: int = 0
    world_size: int = 1
    is_first: bool = True
    device: torch.device = torch.device("cpu")

    def barrier(self) -> None:
        pass


def make_config(output_dir: Path, *, dtype: Any = "float32", **train: Any) -> TrainConfig:
    """A run of 4 steps that logs each of them."""
    defaults = {"max_steps": 4, "lr": 1e-2, "warmup_ratio": 0.34, "log_every": 1, "eval_every": 0, "save_every": 0}
    return TrainConfig(
        model=ModelSection(path="tiny", dtype=dtype),
        compressor=dict(OMNISIFT),
        data=DataSection(train="memory"),
        train=TrainSection(**defaults | train),
        output_dir=str(output_dir),
    )


def make_trainer(config: TrainConfig, ranks: Ranks, unreadable: Set[int] = frozenset()) -> Trainer:
    """A trainer that reads `CLIPS` over and over; those that cannot be read are replaced as files are.

    `train.group_by_length` may be anything; the clips' lengths are known.
    """
    whole, module = make_module(config, ranks)
    size = config.train.micro_batch_size
    sampler = StreamSampler(
        len(CLIPS),
        size,
        seed=config.train.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        accumulation=config.train.gradient_accumulation_steps,
        lengths=None if config.train.group_by_length is None else clip_lengths(whole),
    )
    train = Loader(whole, sampler, unreadable)
    places = range(ranks.rank, VAL_BATCHES + ranks.rank, ranks.world_size)
    val = [(train.batch([place % len(CLIPS)]), place < VAL_BATCHES) for place in places]
    return Trainer(config, module, Streams(train, sampler, val, probes_of(train.batch, VAL_BATCHES)), ranks)


def make_module(config: TrainConfig, ranks: Ranks, family: str = QWEN2_5) -> tuple[nn.Module, TrainingModule]:
    """A whole thinker, and what trains: under ZeRO-3 on a copy of it that was loaded in shards."""
    whole = backbone = tiny_thinker(dtype=getattr(torch, config.model.dtype), family=family)
    if config.train.zero_stage == 3:
        folder = Path(config.output_dir).parent / f"{family}-{config.model.dtype}"
        if ranks.is_first and not folder.exists():
            whole.save_pretrained(folder)
        ranks.barrier()
        with sharded_loading(config):
            backbone = load_backbone(folder, config.model.dtype)
    torch.manual_seed(config.train.seed)
    fields = {name: value for name, value in config.compressor.items() if name != "method"}
    compressor = build_compressor(config.compressor["method"], hidden_size=HIDDEN, **fields)
    make_trainable(adapter_for(backbone), config.train.llm)
    module = TrainingModule(
        backbone,
        compressor,
        estimator=Estimator(config.train.estimator.route, config.train.estimator.candidates),
        gate_clip=config.train.estimator.gate_clip,
        distill_weight=config.train.distill_weight,
        gradient_checkpointing=config.train.gradient_checkpointing,
        teacher=make_teacher(config),
    )
    return whole, module


def clip_lengths(backbone: nn.Module) -> np.ndarray:
    """Tokens of each of `CLIPS`."""
    return np.array([make_batch(backbone, [clip]).input_ids.shape[1] for clip in CLIPS])


class Loader:
    """Batches of `CLIPS` in the sampler's order; encoded beforehand, because ZeRO-3 shards the encoders, too."""

    def __init__(self, backbone: nn.Module, sampler: StreamSampler, unreadable: Set[int] = frozenset()) -> None:
        self.sampler = sampler
        self._unreadable = unreadable
        self._backbone = backbone
        adapter = adapter_for(backbone)
        self._features = [adapter.encode(make_batch(backbone, [clip])) for clip in CLIPS]

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, self.sampler)

    def batch(self, wanted: Sequence[int]) -> Batch:
        clips = [self._readable(clip) for clip in wanted]
        pairs = [(clip, found) for clip, found in zip(wanted, clips, strict=True) if clip != found]
        failures = tuple(
            BadSample(f"clip {clip}", f"{clip}.mp4", "decode_error", "in memory", "none", f"clip {found}")
            for clip, found in pairs
        )
        batch = make_batch(self._backbone, [CLIPS[clip] for clip in clips])
        batch = with_features(batch, Features.join([self._features[clip] for clip in clips]))
        names = tuple(f"clip {clip}" for clip in clips)
        return replace(batch, ids=names, layout=replace(batch.layout, names=names), failures=failures)

    def _readable(self, clip: int) -> int:
        tries = (substitute(clip, attempt, len(CLIPS)) for attempt in count())
        return next(found for found in tries if found not in self._unreadable)


def compressor_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of the compressor's parameters."""
    return {name: value.clone() for name, value in trainer.module.compressor.state_dict().items()}
