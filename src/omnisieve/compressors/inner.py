"""The protocol of methods that also prune inside the LLM.

Such a method has a first stage, an ordinary compressor that plans before the LLM, and cuts: after given decoder
layers it keeps the media tokens that some query rows attend to most. It sees scores and a `TokenLayout` in the
coordinates of the whole sequence, never hidden states, and never a model; `backbones` runs it.

`retained_ratio` is the mean over layers of the media tokens that a layer processes (SEATS eq. 2, OmniDrop appendix E).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from omnisieve.compressors.base import (
    Budget,
    Compressor,
    CompressorError,
    Need,
    Needs,
    Settings,
    build_compressor,
    compressor_type,
)
from omnisieve.compressors.full import Full, FullSettings
from omnisieve.layout import Segments, TokenLayout
from omnisieve.ops.budget import largest_remainder, round_count
from omnisieve.ops.topk import topk_mask
from omnisieve.plan import Plan

Rows = Literal["last_text", "text_after_media", "all_text"]
KvPolicy = Literal["keep_as_processed", "prune_all_layers"]
PUBLISHED_DEPTH = 28
"""Decoder layers of Qwen2.5-Omni-7B."""


@dataclass(frozen=True)
class ScoreAt:
    """Whose attention scores the tokens of a cut: softmax over the sequence as it is then, causal for each row,
    averaged over heads and rows.

    Attributes:
        layer: 0-based decoder layer that lends its input norm, its query and its key projection.
        on: the states they are applied to: "input" of the layer, which gives its own attention, or its "output".
        rows: the query rows: "last_text", the last text token; "text_after_media", all text behind the last media
            token; "all_text". Where a sequence holds answers (training), only rows before its first answer count: a
            row behind would tell what the answer is.
    """

    layer: int
    on: Literal["input", "output"] = "input"
    rows: Rows = "last_text"


@dataclass(frozen=True)
class Cut:
    """A pruning step inside the LLM.

    Attributes:
        after: 0-based decoder layer whose output is pruned; the layer behind it sees the shorter sequence.
        score: None removes all video and audio tokens (late removal).
    """

    after: int
    score: ScoreAt | None = None


@dataclass(frozen=True, kw_only=True)
class InnerSettings(Settings):
    """Settings of every method that prunes inside the LLM.

    Attributes:
        first: name of the method that compresses before the LLM; None takes the one that belongs to the method.
        kv_policy: what the cache holds after the prompt. "keep_as_processed": of each layer the tokens it processed;
            "prune_all_layers": a cut also removes its tokens from the layers before, as published codes do, which
            needs less memory and hides them from everything decoded.
    """

    first: str | None = None
    kv_policy: KvPolicy = "keep_as_processed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_policy not in ("keep_as_processed", "prune_all_layers"):
            raise CompressorError(f"kv_policy is {self.kv_policy!r}; choose 'keep_as_processed' or 'prune_all_layers'")
        if self.first is not None:
            first = compressor_type(self.first)
            if first.learned or issubclass(first, InnerCompressor):
                raise CompressorError(f"first is {self.first!r}; it must be a training-free method before the LLM")


class InnerCompressor(Compressor):
    """A first stage before the LLM, and cuts inside it.

    Subclasses implement `cuts`, `counts`, `keep_after` and `first_fields`, and may override `own_first` and `budget`.

    Attributes:
        num_layers: L, decoder layers of the model; see `for_depth`.
    """

    settings: InnerSettings
    settings_type = InnerSettings
    num_layers: int = PUBLISHED_DEPTH

    def for_depth(self, num_layers: int) -> Self:
        """The same compressor for a model of `num_layers` decoder layers; attaching sees to it."""
        twin = copy.copy(self)
        twin.num_layers = num_layers
        return twin

    # The first stage.

    @property
    def first(self) -> Compressor:
        """The stage before the LLM."""
        if self.settings.first is None:
            return self.own_first()
        return build_compressor(self.settings.first, rounding=self.settings.rounding, **self.first_fields())

    def own_first(self) -> Compressor:
        """The method's own first stage; every token stays unless overridden."""
        return Full(FullSettings())

    def first_fields(self) -> dict[str, Any]:
        """Ratios of a first stage that `settings.first` names."""
        raise NotImplementedError

    @property
    def needs(self) -> tuple[Need, ...]:
        """Of the first stage."""
        return self.first.needs

    def plan(self, embeds: Tensor, layout: TokenLayout, needs: Needs | None = None) -> Plan:
        """What the first stage decides. See `Compressor.plan`."""
        return self.first.plan(embeds, layout, needs)

    # The cuts.

    def cuts(self) -> tuple[Cut, ...]:
        """Steps inside the LLM, `after` strictly increasing and below L - 1."""
        raise NotImplementedError

    def counts(self, layout: TokenLayout) -> np.ndarray:
        """Media tokens, video and audio together, that stay after each cut: int64 [cuts, B] on the host.

        Raises:
            UnreachableRatioError: the ratios cannot be met on this layout; names the reachable range.
        """
        raise NotImplementedError

    def keep_after(self, cut: int, scores: Tensor, alive: Tensor, layout: TokenLayout) -> Tensor:
        """Which media tokens stay after a scored cut, [B, S] bool, as many as `counts` says.

        Args:
            cut: index into `cuts`.
            scores: [B, S] float32 in the coordinates of the whole sequence; 0 where no token is left.
            alive: [B, S] bool, video and audio tokens still there.
            layout: of the whole sequence.
        """
        raise NotImplementedError

    # Accounting.

    def layer_counts(self, layout: TokenLayout) -> np.ndarray:
        """Media tokens that each layer processes, int64 [L, B]; upper bounds if the first stage gives those."""
        kept = np.repeat(self.first.budget(layout).total[None], self.num_layers, axis=0)
        for cut, left in zip(self.cuts(), self.counts(layout), strict=True):
            kept[cut.after + 1 :] = left
        return kept

    def budget(self, layout: TokenLayout) -> Budget:
        """Kept tokens per sample, averaged over layers and rounded.

        How a joint choice divides over the modalities is known from the scores only: the total is split as the first
        stage splits its own. Methods that cut each modality apart override this.
        """
        first = self.first.budget(layout)
        total = np.minimum(round_count(self.layer_counts(layout).mean(axis=0)), first.total)
        video, audio = largest_remainder(total, np.stack([first.video, first.audio], axis=1)).T
        return Budget(video, audio, first.exact)


def keep_best(scores: Tensor, alive: Tensor, segments: Segments, counts: np.ndarray) -> Tensor:
    """The best-scored tokens of each segment that are still there, [B, S] bool.

    Args:
        scores: [B, S].
        alive: [B, S] bool.
        segments: cuts of one modality.
        counts: [B, G] on the host, how many stay.
    """
    wanted = torch.from_numpy(counts).to(scores.device, non_blocking=True)
    chosen = topk_mask(segments.gather(scores), segments.valid & segments.gather(alive), wanted)
    return segments.scatter(chosen, False)
