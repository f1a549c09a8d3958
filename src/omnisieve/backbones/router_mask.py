"""The mask behind a mixture of experts: the stock model weighs its load-balancing loss with it.

Where router logits are asked for, the model computes that loss behind the decoder, with the attention mask it was
called with; a compressed prompt has other rows. So the model is called with a copy of the mask, and the copy then
becomes the mask of what the decoder saw.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

from torch import Tensor

_ASKED = "output_router_logits"


class RouterMask(threading.local):
    """The copy of the forward that a thread is in."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    def install(self, thinker: Any, hooks: ExitStack) -> None:
        """Register the hook; closing `hooks` removes it."""
        hooks.callback(thinker.register_forward_pre_hook(self._before_thinker, with_kwargs=True).remove)

    def follow(self, mask: Tensor) -> None:
        """Say what the decoder sees, [B, K] bool."""
        if self._mask is not None:
            self._mask.data = mask.to(self._mask.dtype)

    def _before_thinker(self, thinker: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._mask = None
        asked = kwargs.get(_ASKED)
        if asked is None:
            asked = getattr(thinker.config.get_text_config(), _ASKED, False)
        if asked and kwargs.get("attention_mask") is not None:
            self._mask = kwargs["attention_mask"] = kwargs["attention_mask"].clone()
        return args, kwargs


def asked_for_router_logits(kwargs: dict[str, Any]) -> bool:
    """Whether the keywords of a decoder ask for them."""
    return bool(kwargs.get(_ASKED))
