"""Published functions' outputs, reproduced. `pytest tests/goldens --goldens DIR` runs every file below DIR."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omnisieve import list_compressors
from tests.goldens import (  # noqa: F401  register their checkers
    edge_checkers,
    efficiency_checkers,
    frame_checkers,
    inner_checkers,
    merging_checkers,
    plain,
    plain_checkers,
    seats_checkers,
)
from tests.goldens.checkers import CHECKERS, Checker
from tests.goldens.conftest import COMMITTED, vector_files, vector_name
from tests.goldens.vectors import Vectors, load, resolver


def checker_for(name: str) -> Checker | None:
    """The checker with the longest matching prefix."""
    prefixes = [prefix for prefix in CHECKERS if name.startswith(prefix)]
    return CHECKERS[max(prefixes, key=len)] if prefixes else None


def family(name: str) -> str:
    """What vector files and compressors have in common: "divprune" of divprune_N36_r350_s0 and of divprune_om."""
    return name.split("_")[0]


def check(name: str, arrays: dict[str, np.ndarray], related) -> Vectors:
    """Run the checker of a file; raise if an array goes unread."""
    checker = checker_for(name)
    assert checker is not None, f"{name}: no checker, though the method is implemented"
    vectors = Vectors(arrays, related)
    checker(vectors)
    assert not vectors.unread(), f"{name}: nobody looks at {sorted(vectors.unread())}"
    return vectors


def test_vectors(vector_file: Path, related) -> None:
    name = vector_name(vector_file)
    if checker_for(name) is None and family(name) not in {family(method) for method in list_compressors()}:
        pytest.skip(f"no method {family(name)!r} is implemented, and no checker reads {vector_file.name}")
    check(name, load(vector_file), related)


def test_implemented_method_without_checker_fails() -> None:
    assert family("random_new_kind_s0") in {family(method) for method in list_compressors()}
    with pytest.raises(AssertionError, match="no checker"):
        check("full_w3_s0", {}, None)


def one_per_checker() -> list[Path]:
    """The first committed file of each prefix."""
    chosen: dict[Checker, Path] = {}
    for path in vector_files(COMMITTED):
        checker = checker_for(vector_name(path))
        if checker is not None:
            chosen.setdefault(checker, path)
    return list(chosen.values())


def test_every_checker_has_a_committed_file() -> None:
    assert {checker_for(vector_name(path)) for path in one_per_checker()} == set(CHECKERS.values())


def perturbed(array: np.ndarray) -> np.ndarray:
    """The array with its middle entry changed a little."""
    copy = np.atleast_1d(array.copy())
    entry = copy.reshape(-1)
    middle = entry.size // 2
    if copy.dtype == bool:
        entry[middle] = ~entry[middle]
    elif copy.dtype.kind == "f":
        entry[middle] += max(1e-3, 1e-3 * float(np.abs(copy).max()))
    else:
        entry[middle] += 1
    return copy.reshape(array.shape)


def test_plain_files_are_what_their_generator_makes() -> None:
    made = dict(plain.files())
    assert {path.name for path in vector_files(COMMITTED) if "plain" in path.name} == set(made)
    for name, values in made.items():
        expected, committed = ({k: np.asarray(v) for k, v in x.items()} for x in (values, load(COMMITTED / name)))
        assert expected.keys() == committed.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(committed[key], value, err_msg=key) if value.dtype.kind == "f" else (
                np.testing.assert_array_equal(committed[key], value, err_msg=key)
            )


@pytest.mark.parametrize("path", one_per_checker(), ids=lambda path: path.stem)
def test_a_changed_output_is_noticed(path: Path) -> None:
    name, arrays, related = vector_name(path), load(path), resolver(COMMITTED, COMMITTED)
    outputs = check(name, arrays, related).compared
    assert outputs
    for output in sorted(outputs):
        with pytest.raises(AssertionError):
            check(name, arrays | {output: perturbed(arrays[output])}, related)


@pytest.mark.parametrize("path", one_per_checker(), ids=lambda path: path.stem)
def test_an_unknown_array_is_noticed(path: Path) -> None:
    with pytest.raises(AssertionError, match="nobody looks at"):
        check(vector_name(path), load(path) | {"surprise": np.zeros(1)}, resolver(COMMITTED, COMMITTED))
