"""A vector file: what was fed to a published function, and what came out.

A checker takes inputs with `given` and compares outputs with `equal` or `close`. What it did neither with fails the
file, so no array goes unread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ATOL = 2e-5  # embeddings and scores
GRAD_RTOL = 1e-4
GRAD_NOISE = 1e-6  # of the largest gradient of a tensor


class Vectors:
    """The arrays of one file."""

    def __init__(self, arrays: Mapping[str, np.ndarray], related: Callable[[str], dict[str, np.ndarray]]) -> None:
        self._arrays = arrays
        self._related = related
        self.inputs: set[str] = set()
        self.compared: set[str] = set()

    def given(self, name: str) -> Any:
        """An input: a Python number or string if it has no dimension, else a tensor, or an array of strings."""
        self.inputs.add(name)
        array = self._arrays[name]
        if array.ndim == 0:
            return array.item()
        return array if array.dtype.kind == "U" else torch.from_numpy(array.copy())

    def related(self, reference: str) -> dict[str, np.ndarray]:
        """Arrays of the file that another one names."""
        return self._related(reference)

    def names(self, prefix: str) -> list[str]:
        """Arrays whose name starts with `prefix`, without it."""
        return [name.removeprefix(prefix) for name in self._arrays if name.startswith(prefix)]

    def equal(self, name: str, actual: Any) -> None:
        """Masks, indices and counts agree exactly."""
        expected = self._arrays[name]
        self.compared.add(name)
        actual = actual.detach().numpy() if isinstance(actual, Tensor) else np.asarray(actual)
        np.testing.assert_array_equal(actual, expected, err_msg=name, strict=expected.ndim > 0)

    def output(self, name: str) -> Tensor:
        """An output that the checker compares in its own way."""
        self.compared.add(name)
        return torch.from_numpy(self._arrays[name].copy())

    def close(self, name: str, actual: Tensor, *, atol: float = ATOL) -> None:
        """Embeddings and scores agree to `atol`."""
        expected = self._arrays[name]
        self.compared.add(name)
        np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=atol, err_msg=name)

    def gradient(self, name: str, actual: Tensor | None) -> None:
        """Gradients agree to 1e-4, relative for each entry; what cancels to rounding error may differ by that."""
        expected = self._arrays[name]
        self.compared.add(name)
        assert actual is not None, f"{name}: no gradient"
        noise = GRAD_NOISE * float(np.abs(expected).max())
        np.testing.assert_allclose(actual.numpy(), expected, rtol=GRAD_RTOL, atol=noise, err_msg=name)

    def unread(self) -> set[str]:
        """Arrays that a checker neither took as an input nor compared."""
        return set(self._arrays) - self.inputs - self.compared


def load(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file. In a JSON file every value is one, named by its keys: "outer/inner"."""
    if path.suffix == ".json":
        return dict(_leaves(json.loads(path.read_text(encoding="utf-8"))))
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", np.asarray(value)


def resolver(folder: Path, fallback: Path) -> Callable[[str], dict[str, np.ndarray]]:
    """How a file refers to another: a path below `folder`, or its file name anywhere there, else in `fallback`."""

    def resolve(reference: str) -> dict[str, np.ndarray]:
        for root in (folder, fallback):
            found = [root / reference, *sorted(root.rglob(Path(reference).name))]
            path = next((p for p in found if p.is_file()), None)
            if path is not None:
                return load(path)
        raise FileNotFoundError(f"{reference} is neither below {folder} nor below {fallback}")

    return resolve
