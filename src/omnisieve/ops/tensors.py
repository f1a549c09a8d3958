"""Whether named tensors are those that are wanted, by name, shape and byte."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def misfits(found: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> list[str]:
    """What keeps tensors from taking the places of those that are wanted; empty if nothing does.

    Args:
        found: by name.
        wanted: shapes by name.
    """
    problems = [f"missing: {name}" for name in wanted if name not in found]
    problems += [f"left over: {name}" for name in found if name not in wanted]
    problems += [
        f"shape of {name}: {tuple(found[name].shape)} instead of {tuple(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    return problems


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree in type, shape and every byte, so that a NaN equals itself."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(as_bytes(one), as_bytes(other))


def as_bytes(value: Tensor) -> Tensor:
    """uint8 [n], on the host."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
