"""What the ranks encode together, where they wait for each other at every module."""

from __future__ import annotations

from collections.abc import Sequence

from omnisieve.data.batch import Batch
from omnisieve.layout import Modality
from omnisieve.training.distributed import Ranks

_ENCODED = (Modality.IMAGE, Modality.VIDEO, Modality.AUDIO)


class Lockstep:
    """Tells every rank which media the others have. See `backbones.dummy_media`."""

    def __init__(self, ranks: Ranks, zero_stage: int) -> None:
        self._ranks = ranks
        self._needed = zero_stage == 3 and ranks.world_size > 1

    def media(self, batches: Sequence[Batch]) -> list[frozenset[Modality]]:
        """Media that any rank encodes, by micro-batch; none where ranks do not wait for each other.

        Args:
            batches: of this rank, as many as every other has.
        """
        if not self._needed:
            return [frozenset()] * len(batches)
        own = [float(modality in batch.to_encode) for batch in batches for modality in _ENCODED]
        anywhere = iter(self._ranks.sum(own))
        return [frozenset(modality for modality in _ENCODED if next(anywhere)) for _ in batches]
