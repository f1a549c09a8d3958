"""A plan says which tokens stay, what is merged into them and how they are gated; it is applied here and only here.

Applying gathers rows. Position ids are indexed, never recomputed: a kept token keeps its own id, and decoding goes
on at the uncompressed maximum + 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from omnisieve.layout import Modality, TokenLayout
from omnisieve.ops.budget import round_count
from omnisieve.ops.topk import topk_mask

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class Merge:
    """x[target] = own[target] * x[target] + sum over triples of weight * x[source], all from the values before.

    Attributes:
        source, target: [B, M] long, token positions.
        weight: [B, M]; 0 voids a triple.
        own: [B, S], the share of a token's own value; 1 where nothing is merged.
    """

    source: Tensor
    target: Tensor
    weight: Tensor
    own: Tensor

    def apply(self, embeds: Tensor) -> Tensor:
        """Embeddings [B, S, D] with the merges written at the targets."""
        width = embeds.shape[-1]
        moved = embeds.gather(1, self.source.unsqueeze(-1).expand(-1, -1, width)) * self.weight.unsqueeze(-1)
        target = self.target.unsqueeze(-1).expand(-1, -1, width)
        merged = embeds * self.own.unsqueeze(-1).to(embeds.dtype)
        return merged.scatter_add(1, target, moved.to(embeds.dtype))


@dataclass(frozen=True)
class Compressed:
    """What is left of a batch, K tokens wide (K is the longest kept sequence).

    Attributes:
        embeds: [B, K, D]; zeros in padding.
        index: [B, K] long, position of each row before compression.
        attention_mask: [B, K] bool, False in padding.
        position_ids: as given, last dimension K.
        labels: as given, [B, K], -100 in padding.
        key_gate: [B, K] or None: factor of each key in the `masked` route.
        ragged: whether there is padding, known on the host.
    """

    embeds: Tensor
    index: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    labels: Tensor | None
    key_gate: Tensor | None
    ragged: bool


@dataclass(frozen=True)
class Plan:
    """The decision of a compressor for one batch.

    Attributes:
        keep: [B, S] bool, text and images included, padding excluded.
        kept: [B] int64 on the host, how many tokens `keep` holds per sample; an upper bound when `exact` is False.
        exact: whether `kept` is exact (False only for published variants whose count depends on the content).
        scores: [B, S] or None: the scores that were compared; meaningless outside video and audio.
        gate: [B, S] or None: straight-through gate, 1 for kept and 0 for dropped tokens.
        merge: what is merged into kept tokens.
        candidates: [B, S] bool or None: dropped tokens that stay in the sequence as gated keys, so that they are
            taught (`masked` route). None is the `hard_drop` route.
        candidate_counts: [B] int64 on the host, with `candidates`.
    """

    keep: Tensor
    kept: np.ndarray
    exact: bool = True
    scores: Tensor | None = None
    gate: Tensor | None = None
    merge: Merge | None = None
    candidates: Tensor | None = None
    candidate_counts: np.ndarray | None = None

    def is_identity(self, layout: TokenLayout) -> bool:
        """Whether applying changes nothing, known without looking at the device."""
        present = layout.counts(Modality.TEXT, Modality.IMAGE, Modality.VIDEO, Modality.AUDIO)
        return self.exact and self.gate is None and self.merge is None and bool((self.kept == present).all())

    def with_candidates(self, layout: TokenLayout, share: float = 1.0, seed: int = 0) -> Plan:
        """The same selection in the `masked` route.

        Args:
            layout: the layout the plan was made from.
            share: share of each sample's dropped tokens that stays as candidates; 1 keeps the whole sequence.
            seed: of their choice, which is uniform; it depends on nothing else but the sample, see `TokenLayout.noise`.

        Raises:
            ValueError: without gates there is nothing to teach; with merges the routes would differ in value.
        """
        if self.gate is None or self.merge is not None or not self.exact:
            raise ValueError("the masked route needs a learned compressor in training mode, without merges")
        dropped = layout.mask(Modality.VIDEO, Modality.AUDIO) & ~self.keep
        total = layout.counts(Modality.TEXT, Modality.IMAGE, Modality.VIDEO, Modality.AUDIO)
        counts = round_count((total - self.kept) * share)
        if share < 1:
            counts_ = torch.from_numpy(counts).to(dropped.device, non_blocking=True)
            dropped = topk_mask(layout.noise(seed), dropped, counts_, None)
        return replace(self, candidates=dropped, candidate_counts=counts)

    def apply(
        self,
        embeds: Tensor,
        *,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: PaddingSide = "right",
    ) -> Compressed:
        """Drop, merge and gate.

        Args:
            embeds: [B, S, D] merged embeddings.
            position_ids: [..., B, S]. Of four rows, the first counts the sequence and is rebuilt without gaps,
                because gaps there are read as packed sequences; rope rows are indexed.
            labels: [B, S].
            padding_side: where the padding of a ragged result goes.
        """
        stay = self.keep if self.candidates is None else self.keep | self.candidates
        counts = self.kept if self.candidate_counts is None else self.kept + self.candidate_counts
        index, mask = compact(stay, int(counts.max()), padding_side)
        if self.merge is not None:
            embeds = self.merge.apply(embeds)
        if self.gate is not None and self.candidates is None:
            embeds = embeds * self.gate.unsqueeze(-1).to(embeds.dtype)
        rows = embeds.gather(1, index.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
        ragged = not self.exact or bool((counts != counts[0]).any())
        return Compressed(
            embeds=rows.masked_fill(~mask.unsqueeze(-1), 0) if ragged else rows,
            index=index,
            attention_mask=mask,
            position_ids=None if position_ids is None else select_positions(position_ids, index, mask),
            labels=None if labels is None else labels.gather(1, index).masked_fill(~mask, -100),
            key_gate=None if self.candidates is None else self._key_gate().gather(1, index),
            ragged=ragged,
        )

    def measured(self, layout: TokenLayout) -> dict[str, np.ndarray]:
        """Kept tokens per sample and modality, read back from the device (one synchronisation).

        Returns:
            "video" and "audio", [B] int64 each.
        """
        keep = self.keep.cpu().numpy()
        return {
            name: (keep & (layout.modality == modality)).sum(axis=1)
            for name, modality in (("video", Modality.VIDEO), ("audio", Modality.AUDIO))
        }

    def _key_gate(self) -> Tensor:
        assert self.gate is not None  # with_candidates saw to it
        return self.gate


def select_positions(position_ids: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """Position ids [..., B, S] at `index` [B, K]; see `Plan.apply`."""
    chosen = position_ids.gather(-1, index.expand(*position_ids.shape[:-2], *index.shape))
    if position_ids.dim() == 3 and position_ids.shape[0] == 4:
        sequence = (mask.long().cumsum(-1) - 1).clamp(min=0)
        chosen = torch.cat([sequence[None], chosen[1:]])
    return chosen


def compact(stay: Tensor, width: int, padding_side: PaddingSide) -> tuple[Tensor, Tensor]:
    """Positions of the staying tokens in order, [B, width], and which slots are filled.

    Args:
        stay: [B, S] bool.
        width: of the result. With padding on the left it is the last `width` tokens of a row that are taken.
        padding_side: which slots stay empty in a row with fewer; they hold positions of other tokens, none twice.
    """
    if padding_side == "right":
        index = (~stay).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    else:
        index = stay.to(torch.uint8).argsort(dim=1, stable=True)[:, stay.shape[1] - width :]
    return index, stay.gather(1, index)
