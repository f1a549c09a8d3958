"""A few fixed clips of the validation split: how much of what stays of them changes, and pictures of it.

Validation looks at them anyway, always at the compressor's own ratio, so remembering what stayed costs nothing. What
stayed at the last validation is part of a checkpoint.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from omnisieve.data.batch import Batch
from omnisieve.data.errors import DataError
from omnisieve.layout import MEDIA, Modality
from omnisieve.training.distributed import Ranks
from omnisieve.training.pictures import ClipMedia, picture


class Probes:
    """What stays of the probe clips. All ranks know; each notes those in its own share of the split."""

    def __init__(self, clips: Mapping[str, Callable[[], ClipMedia]], ranks: Ranks) -> None:
        """
        Args:
            clips: by id, each with a way to get at its media.
            ranks: this process among its peers.
        """
        self._clips = clips
        self._ranks = ranks
        self._noted: dict[str, tuple[np.ndarray, Tensor]] = {}
        self._kept: dict[str, np.ndarray] = {}
        self._media: dict[str, ClipMedia | None] = {}

    def note(self, batch: Batch, keep: Tensor) -> None:
        """Remember what stays of the probe clips in a batch, [B, S] bool on the device; nothing waits for it."""
        for row, name in enumerate(batch.ids):
            if name in self._clips:
                self._noted[name] = batch.layout.modality[row], keep[row]

    def settle(self) -> dict[str, float]:
        """After a validation: how much changed since the last; all ranks call this.

        Returns:
            per modality the share of the tokens that stay now and did not then, over all probe clips that were seen
            both times; empty after the first validation.
        """
        own = {name: (modality, keep.cpu().numpy()) for name, (modality, keep) in self._noted.items()}
        self._noted.clear()
        seen = {name: rows for part in self._ranks.gather(own) for name, rows in part.items()}
        kept, changed = dict.fromkeys(MEDIA, 0), dict.fromkeys(MEDIA, 0)
        for name, (modality, keep) in seen.items():
            present = modality != Modality.PADDING
            now, before = keep[present], self._kept.get(name)
            self._kept[name] = now
            if before is None or len(before) != len(now):
                continue
            for kind in MEDIA:
                member = modality[present] == kind
                kept[kind] += int(now[member].sum())
                changed[kind] += int((now & ~before)[member].sum())
        return {kind.name.lower(): changed[kind] / kept[kind] for kind in MEDIA if kept[kind]}

    def pictures(self, title: str) -> dict[str, np.ndarray]:
        """Each probe clip as it was last seen, by id, RGB arrays; on the first rank.

        Args:
            title: behind the id.
        """
        drawn = {}
        for name, keep in self._kept.items():
            media = self._media_of(name, len(keep))
            if media is not None:
                drawn[name] = picture(media, keep, f"{name}, {title}")
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """What stayed last, as JSON values."""
        bits = {name: base64.b64encode(np.packbits(keep).tobytes()).decode() for name, keep in self._kept.items()}
        return {name: [len(keep), bits[name]] for name, keep in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on comparing with what stayed then."""
        for name, (length, bits) in state.items():
            packed = np.frombuffer(base64.b64decode(bits), dtype=np.uint8)
            self._kept[name] = np.unpackbits(packed, count=length).astype(bool)

    def _media_of(self, name: str, length: int) -> ClipMedia | None:
        """Decoded once; None, and said once, where that fails or does not give the tokens that were seen."""
        if name in self._clips and name not in self._media:
            self._media[name] = None
            try:
                media = self._clips[name]()
            except DataError as error:
                tqdm.write(f"no pictures of probe clip {name}: {error}", file=sys.stderr)
            else:
                if len(media.tokens) == length:
                    self._media[name] = media
                else:
                    reason = f"it has {len(media.tokens)} tokens when decoded, and {length} in the validation"
                    tqdm.write(f"no pictures of probe clip {name}: {reason}", file=sys.stderr)
        # None also for one that an earlier part of the run looked at, with more probe clips.
        return self._media.get(name)
