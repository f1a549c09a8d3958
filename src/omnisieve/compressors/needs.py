"""Statistics of the frozen encoders that a method may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from omnisieve.compressors.ratios import CompressorError
from omnisieve.layout import Modality

Statistic = Literal["attention_received", "mean_query_attention", "keys"]
Span = Literal["encoder", "window", "frame", "global"]
# What may be asked for, per kind and modality.
_SPANS: Mapping[tuple[str, Modality], tuple[Span, ...]] = {
    ("attention_received", Modality.VIDEO): ("encoder", "frame", "window", "global"),
    ("attention_received", Modality.AUDIO): ("encoder", "window", "global"),
    ("mean_query_attention", Modality.VIDEO): ("frame",),
    ("keys", Modality.VIDEO): ("encoder",),
    ("keys", Modality.AUDIO): ("encoder",),
}


@dataclass(frozen=True)
class Need:
    """A statistic of the encoder's last block that a method wants per media token beside the embeddings.

    The mean of both attentions over a span is 1, so values of different spans do not compare. A method that ranks
    across spans asks for a wider one, or divides by the mean of the token's window
    (`compressors.saliency.relative_to_window`).

    Attributes:
        kind: "attention_received" [B, S]: softmax attention, mean over heads, summed over the queries of the span.
            "mean_query_attention" [B, S]: attention of the mean query of the span to the tokens' mean keys, mean over
            heads, times the number of tokens (FastVID's saliency for Qwen).
            "keys" [B, S, d_head]: mean over heads, after the rotary embedding where the block has one.
            Encoder positions that make one token are averaged; 0 outside the modality.
        modality: of which tokens; video or audio.
        span: which positions attend to each other. "encoder": as the block itself attends (a frame of video; of audio
            2 s in Qwen2.5-Omni, 8 s in Qwen3-Omni); "frame": one frame, of video only; "window": two consecutive
            frames of an item, 2 s of audio; "global": the whole item. Keys have no span: leave "encoder". The
            attention of a mean query is defined for "frame" only.

    Raises:
        CompressorError: these do not go together.
    """

    kind: Statistic
    modality: Modality
    span: Span = "encoder"

    def __post_init__(self) -> None:
        kinds = sorted({kind for kind, _ in _SPANS})
        if self.kind not in kinds:
            raise CompressorError(f"no encoder statistic is called {self.kind!r}; there are {', '.join(kinds)}")
        spans = _SPANS.get((self.kind, self.modality), ())
        if self.span not in spans:
            raise CompressorError(
                f"{self.kind} of {self.modality.name.lower()} tokens does not exist for span {self.span!r}; "
                f"possible are {', '.join(map(repr, spans)) or 'none'}"
            )


Needs = Mapping[Need, Tensor]  # [B, S] or [B, S, d_head] each, see `Need`
