"""What one forward hands from hook to hook."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from omnisieve.backbones.inner import InnerRun
from omnisieve.compressors.base import Need
from omnisieve.layout import TokenLayout


@dataclass(frozen=True)
class Expected:
    """What the caller said about the next forward."""

    layout: TokenLayout | None = None
    needs: Mapping[Need, Tensor] | None = None
    labels: Tensor | None = None
    answer_tokens: int = 0


@dataclass(frozen=True)
class Answers:
    """Labels of the latest forward: of the rows that enter the decoder, or what `run` makes of them behind it."""

    labels: Tensor
    count: int
    run: InnerRun | None


class Flow(threading.local):
    """What one forward hands from hook to hook."""

    def __init__(self) -> None:
        self.expected = Expected()
        self.input_ids: Tensor | None = None
        self.saliency: dict[Need, Tensor] = {}
        self.answers: Answers | None = None
