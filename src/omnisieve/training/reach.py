"""Whether samples can have the ratio that is asked of a compressor, known before any forward."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from omnisieve.compressors import Compressor, UnreachableRatioError
from omnisieve.config import RatioSection
from omnisieve.data.batch import Sample
from omnisieve.data.errors import SampleError
from omnisieve.data.manifest import Conversation
from omnisieve.layout import TokenLayout

_CURE = "choose a ratio within reach, leave a fixed video_ratio or audio_ratio out, or take the line out"


class Reach:
    """Refuses samples that some compressor cannot bring to its ratio: in a forward it would end the run."""

    def __init__(self, compressors: Sequence[Compressor], ids_per_window: int) -> None:
        """
        Args:
            compressors: each is asked; see `drawn`.
            ids_per_window: see `TokenLayout.stack`.
        """
        # Only counts are asked of them, in worker processes, where weights on a device would be in the way.
        self._compressors = [copy.deepcopy(compressor).to("meta") for compressor in compressors]
        self._ids_per_window = ids_per_window

    def __call__(self, conversation: Conversation, sample: Sample) -> None:
        """
        Args:
            conversation: that the sample was made of.
            sample: to ask about.

        Raises:
            SampleError: kind "unreachable"; its reason has the range that can be reached.
        """
        layout = TokenLayout.stack([sample.tokens], ids_per_window=self._ids_per_window, names=[sample.id])
        try:
            for compressor in self._compressors:
                compressor.budget(layout)
        except UnreachableRatioError as error:
            raise SampleError(conversation.file, "unreachable", str(error), _CURE) from error


def drawn(compressor: Compressor, ratio: RatioSection) -> tuple[Compressor, ...]:
    """The compressor at the ends of the range that training draws its ratio from; as it is where none is drawn."""
    if ratio.min is None or ratio.max is None:
        return (compressor,)
    return tuple(compressor.at(retained_ratio=end) for end in dict.fromkeys((ratio.min, ratio.max)))
