"""Rows that no method can stand in for: what would be possible with the right tokens, or without any.

They are compressors that know what a method must not know (which tokens the questions are about), so they are
not registered and cannot be attached by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnisieve.compressors import Budget, Compressor, CompressorError, Settings
from omnisieve.compressors.base import Needs
from omnisieve.compressors.fields import make_settings
from omnisieve.layout import Modality, TokenLayout
from omnisieve.plan import Plan

Evidence = Mapping[str, Sequence[Any]]
"""`{"video": [[grid, row, column], ...], "audio": [token, ...]}` of the only video of a clip and its sound."""


class Oracle(Compressor):
    """Keeps the evidence, and random tokens up to the budget."""

    name = "oracle"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.evidence: Sequence[Evidence] = ()

    def plan(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> Plan:
        """See `Compressor.plan`; `evidence` must have been set to one entry per sample."""
        if len(self.evidence) != layout.batch_size:
            raise CompressorError("oracle needs the evidence of every sample; this manifest has none")
        noise = np.random.default_rng(0).random(layout.modality.shape)
        scores = torch.from_numpy(evidence_mask(self.evidence, layout) + noise).to(embeds.device)
        keep = [self.select(modality, scores, layout) for modality in (Modality.VIDEO, Modality.AUDIO)]
        return self.make_plan(layout, keep[0] | keep[1])


class NoMedia(Compressor):
    """Drops every video and audio token: what the words of a question alone tell."""

    name = "no_media"

    def plan(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> Plan:
        """See `Compressor.plan`."""
        return self.make_plan(layout, torch.zeros(layout.modality.shape, dtype=torch.bool, device=embeds.device))

    def budget(self, layout: TokenLayout) -> Budget:
        nothing = np.zeros(layout.batch_size, dtype=np.int64)
        return Budget(nothing, nothing)


BOUNDS: dict[str, type[Compressor]] = {bound.name: bound for bound in (Oracle, NoMedia)}


def build_bound(name: str, **values: Any) -> Compressor:
    """The bound `name` with the fields `values`.

    Raises:
        CompressorError: see `make_settings`.
    """
    return BOUNDS[name](make_settings(BOUNDS[name].settings_type, values, name))


def show_evidence(compressor: Compressor, evidence: Sequence[Evidence]) -> None:
    """Tell a bound what the questions of the next batch are about; nothing else looks at it."""
    if isinstance(compressor, Oracle):
        compressor.evidence = evidence


def evidence_mask(evidence: Sequence[Evidence], layout: TokenLayout) -> np.ndarray:
    """[B, S] bool on the host: tokens that the manifest calls evidence."""
    place = np.stack([layout.frame, layout.row, layout.column], axis=-1)
    mask = np.zeros(layout.modality.shape, dtype=bool)
    for sample, tokens in enumerate(evidence):
        video = layout.modality[sample] == Modality.VIDEO
        wanted = np.asarray(tokens["video"], dtype=np.int64).reshape(-1, 1, 3)
        mask[sample] = video & (place[sample] == wanted).all(axis=-1).any(axis=0)
        audio = np.flatnonzero(layout.modality[sample] == Modality.AUDIO)
        mask[sample, audio[np.asarray(tokens["audio"], dtype=np.int64)]] = True
    return mask
