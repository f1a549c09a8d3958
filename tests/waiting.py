"""Finds code that makes the host wait for the device, without a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "repeat_interleave"),
    *("_unique2", "unique_dim", "unique_consecutive", "_linalg_check_errors"),
}
INDEXES = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_"}


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose shape or value the host reads, boolean indices, and copies that block.

    Meant for tensors on `meta`. These have no values, so most readers fail on them by themselves; the others, such as
    writing through a boolean index, are only known by name. A copy to the device must not block either: it would wait
    for all that was queued before it.

    Raises:
        AssertionError: names the operation.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        assert name not in READS, f"the host reads the result of {name}"
        if name in INDEXES:
            assert not any(_is_mask(index) for index in args[1]), f"{name} with a boolean index"
        if name in COPIES:
            source, target = _ends(name, args, kwargs)
            assert source.type != "meta" or target.type == "meta", f"{name} from the device"
            blocking = not (kwargs.get("non_blocking") or args[2:3] == (True,))
            assert source == target or not blocking, f"{name} to the device that blocks"
        return func(*args, **kwargs)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _ends(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.device, torch.device]:
    """From where to where a copy goes."""
    if name == "copy_":
        return args[1].device, args[0].device
    return args[0].device, torch.device(kwargs.get("device") or args[0].device)
