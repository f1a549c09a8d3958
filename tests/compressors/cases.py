"""Every method, in the settings worth testing, and the samples that all of them must cope with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from omnisieve import build_compressor, list_compressors
from omnisieve.compressors import Compressor, Need, compressor_type
from omnisieve.compressors.inner import InnerCompressor
from omnisieve.layout import TokenLayout
from omnisieve.plan import Plan
from tests.layouts import QWEN2_5, LayoutSpec, make_layout

HIDDEN, HEAD = 16, 8

# Fields beside the ratio. A method without an entry is tested as it comes.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "dash": [{}, {"min_segment": 4, "boundary_bonus": 0.3}, {"scope": "file", "min_segment": 7, "threshold": 0.0}],
    "fastvid": [{}, {"variant": "qwen", "scenes": 2}, {"scenes": 1, "scene_similarity": -1.0}],
    "omnidrop": [
        {},
        {"normalize": "max", "query": "all_text", "l_div": 2},
        {"schedule": "exponential", "lambda_div": 0.0},
    ],
    "omnisift": [
        {"video_pruner": "learned", "width": 32, "heads": 4, "pruner_channels": 8},
        {"video_pruner": "similarity", "width": 32, "heads": 4, "pruner_channels": 8},
        {"base": "omnizip", "chunks": "pair_grids", "width": 32, "heads": 4, "pruner_channels": 8},
    ],
    "omnizip": [
        {},
        {"variant": "units"},
        {"variant": "paper"},
        {"scope": "file", "merge_scope": "file", "merge_group": 15},
    ],
    "seats": [
        {},
        {"next_layer": True, "normalize_scores": "length", "attention_weighted": False},
        {"late_removal": False, "normalize_scores": "zscore", "tau": 0.3},
        {"steps": "equal", "lambda_": 1.3},
    ],
    "stvp": [{"audio_novelty": 0.3}],
}
PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("dash", {}),
    ("dash", {"min_segment": 4}),
    ("divprune", {}),
    ("divprune_om", {}),
    ("dycoke", {}),
    ("dycoke_va", {}),
    ("fastvid", {}),
    ("fastvid", {"scenes": 1, "scene_similarity": -1.0}),
    ("fastvid", {"variant": "qwen", "scene_similarity": -1.0}),
    ("omnisift", VARIANTS["omnisift"][1]),
    ("omnisift", VARIANTS["omnisift"][1] | {"chunks": "pair_grids"}),
    ("omnizip", {}),
    ("omnizip", {"variant": "units"}),
    ("omnizip", {"variant": "paper"}),
    ("random", {}),
    ("stvp", {}),
    ("visionzip", {}),
    ("visionzip_om", {}),
    ("windivprune", {}),
    ("windivprune", {"attention_weighted": False}),
]
ALL = [(name, fields) for name in list_compressors() for fields in VARIANTS.get(name, [{}])]
METHODS = [case for case in ALL if not issubclass(compressor_type(case[0]), InnerCompressor)]
INNER = [case for case in ALL if case not in METHODS]

LAYOUTS = {
    "audio_video": LayoutSpec(),
    "silent": LayoutSpec(audio=False),
    "audio_only": LayoutSpec(video=False),
    "separate_audio": LayoutSpec(separate_audio=True),
    "two_videos": LayoutSpec(videos=2, windows=2),
    "two_sizes": LayoutSpec(videos=2, windows=2, growth=1),
    "image": LayoutSpec(images=7),
    "odd_grids": LayoutSpec(odd_grids=True, rows=3, columns=5),
    "capped_frame_rate": LayoutSpec(windows=5, grid_every=2, grids_per_window=1),
    "long_audio": LayoutSpec(windows=4, rows=2, columns=2, audio_per_window=26),
    "one_short_window": LayoutSpec(windows=1, grids_per_window=1, rows=2, columns=2, audio_per_window=3),
    "text_only": LayoutSpec(video=False, audio=False),
}

# Ratios that every method is tried at; methods that cannot go so low on most samples have their own.
RATIOS: dict[str, dict[str, float]] = {
    "easy": {"retained_ratio": 0.25},
    "hard": {"retained_ratio": 0.1},
    "pair": {"video_ratio": 0.15, "audio_ratio": 0.6},
    "published": {"retained_ratio": 0.4},
}
INTACT = {"easy": {"retained_ratio": 0.6}, "hard": {"retained_ratio": 0.3}, "published": {"retained_ratio": 0.7}}
OWN_RATIOS: dict[str, dict[str, dict[str, float]]] = {
    "divprune": INTACT,
    "dycoke": {
        "easy": {"retained_ratio": 0.7},
        "hard": {"retained_ratio": 0.5},
        "pair": {"video_ratio": 0.4, "audio_ratio": 0.6},
        "published": {"retained_ratio": 0.7},
    },
    "dycoke_va": {
        "easy": {"retained_ratio": 0.6},
        "hard": {"retained_ratio": 0.4},
        "pair": {"video_ratio": 0.4, "audio_ratio": 0.6},
    },
    "fastvid": INTACT,
}
# Samples that a method cannot bring so low: those of much audio where audio stays whole, and those that end early in
# a group of four frames where the first frame does.
OUT_OF_REACH: dict[tuple[str, str], tuple[str, ...]] = {
    ("divprune", "easy"): ("audio_only", "long_audio"),
    ("divprune", "hard"): ("audio_only", "long_audio", "capped_frame_rate", "one_short_window"),
    ("divprune", "published"): ("audio_only", "long_audio"),
    ("fastvid", "easy"): ("audio_only", "long_audio"),
    ("fastvid", "hard"): ("audio_only", "long_audio", "capped_frame_rate", "one_short_window"),
    ("fastvid", "published"): ("audio_only", "long_audio"),
    ("dycoke", "easy"): ("audio_only", "long_audio", "one_short_window"),
    ("dycoke", "hard"): ("audio_only", "long_audio", "one_short_window", "capped_frame_rate", "odd_grids"),
    ("dycoke", "pair"): ("one_short_window",),
    ("dycoke", "published"): ("audio_only", "long_audio"),
    ("dycoke_va", "easy"): ("one_short_window",),
    ("dycoke_va", "hard"): ("one_short_window", "two_videos", "two_sizes"),
    ("dycoke_va", "pair"): ("one_short_window",),
}


def ratios_of(case: tuple[str, dict[str, Any]], name: str) -> dict[str, float]:
    """The ratios that a method is tried at."""
    return OWN_RATIOS.get(case[0], {}).get(name, RATIOS[name])


def in_reach(case: tuple[str, dict[str, Any]], ratio: str) -> tuple[str, ...]:
    """Names of the samples that a method can bring to a ratio."""
    return tuple(name for name in LAYOUTS if name not in OUT_OF_REACH.get((case[0], ratio), ()))


def label(case: tuple[str, dict[str, Any]]) -> str:
    """Test id of a method with its fields."""
    return "-".join([case[0], *(str(value) for value in case[1].values() if isinstance(value, str))])


def build(case: tuple[str, dict[str, Any]], *, hidden_size: int = HIDDEN, **budget: Any) -> Compressor:
    """The method with fixed weights; `full` has one ratio only."""
    name, fields = case
    torch.manual_seed(0)
    budget = {"retained_ratio": 1.0} if name == "full" else budget
    return build_compressor(name, hidden_size=hidden_size, **fields, **budget).eval()


Sample = str | LayoutSpec  # a name is one of `LAYOUTS`


class Batch:
    """Layout, embeddings and statistics of some samples; what a sample holds does not depend on its neighbours."""

    def __init__(
        self, samples: Sequence[Sample], padding_side: str = "right", family: str = QWEN2_5, width: int = HIDDEN
    ) -> None:
        specs = [LAYOUTS[sample] if isinstance(sample, str) else sample for sample in samples]
        self.layout: TokenLayout = make_layout(*specs, padding_side=padding_side, family=family)
        self.embeds = torch.full((len(specs), self.layout.length, width), 1e3)
        self._attention = torch.full((len(specs), self.layout.length), 1e3)
        self._keys = torch.full((len(specs), self.layout.length, HEAD), 1e3)
        self.present = torch.from_numpy(self.layout.modality > 0)
        for row, spec in enumerate(specs):
            generator = torch.Generator().manual_seed(crc32(repr(spec).encode()))
            size = int(self.present[row].sum())
            self.embeds[row, self.present[row]] = torch.randn(size, width, generator=generator)
            self._attention[row, self.present[row]] = torch.rand(size, generator=generator) + 0.1
            self._keys[row, self.present[row]] = torch.randn(size, HEAD, generator=generator)

    def to(self, target: torch.device | torch.dtype | str) -> Batch:
        """The same with its tensors elsewhere, or in another precision."""
        twin = copy.copy(self)
        for name in ("embeds", "_attention", "_keys"):
            setattr(twin, name, getattr(self, name).to(target))
        if not isinstance(target, torch.dtype):
            twin.layout, twin.present = self.layout.to(target), self.present.to(target)
        return twin

    def needs(self, compressor: Compressor) -> dict[Need, Tensor]:
        return {need: self._statistic(need) for need in compressor.needs}

    def _statistic(self, need: Need) -> Tensor:
        outside = ~self.layout.mask(need.modality)
        if need.kind == "keys":
            return self._keys.masked_fill(outside.unsqueeze(-1), 0)
        return self._attention.masked_fill(outside, 0)

    def sample(self, row: int, values: Tensor) -> Tensor:
        """One sample's values without padding."""
        return values[row][self.present[row]]


@cache
def batch_of(*samples: Sample, padding_side: str = "right", family: str = QWEN2_5) -> Batch:
    return Batch(samples, padding_side, family)


@torch.no_grad()
def plan_of(compressor: Compressor, batch: Batch) -> Plan:
    return compressor.plan(batch.embeds, batch.layout, batch.needs(compressor))
