"""Files of sizes: what they are about, and what stands where a sample is broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omnisieve.data.dataset import ATTEMPTS, substitute
from omnisieve.data.errors import DataError
from omnisieve.data.length_limit import LengthLimit
from omnisieve.data.sizes import check_sizes, read_sizes, sizes_in_training, write_sizes

SIZES = [[10, 40, 25], None, [7, 0, 0], [9, 120, 0]]
PREPROCESSING = {"fps": 2.0, "rules": {"tokens": (1, 2)}}


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("some lines\n")
    write_sizes(tmp_path / "sizes.jsonl", manifest, PREPROCESSING, SIZES)
    return tmp_path / "sizes.jsonl", manifest


def test_sizes_come_back(paths: tuple[Path, Path]) -> None:
    check_sizes(*paths)
    np.testing.assert_array_equal(
        read_sizes(*paths, PREPROCESSING), [[10, 40, 25], [-1, -1, -1], [7, 0, 0], [9, 120, 0]]
    )


def test_sizes_of_other_data_are_refused(paths: tuple[Path, Path]) -> None:
    path, manifest = paths
    with pytest.raises(DataError, match=r"other preprocessing \(fps was 2\.0, is 1\.0\): run tools/check_data\.py"):
        read_sizes(path, manifest, PREPROCESSING | {"fps": 1.0})
    manifest.write_text("other lines\n")
    with pytest.raises(DataError, match="is about another manifest"):
        check_sizes(path, manifest)
    path.write_text("")
    with pytest.raises(DataError, match="is no file of sizes"):
        check_sizes(path, manifest)
    with pytest.raises(DataError, match=r"there is no such file.*tools/check_data\.py"):
        check_sizes(path.with_name("none"), manifest)


def test_a_broken_sample_has_the_size_of_its_replacement() -> None:
    sizes = np.random.default_rng(0).integers(1, 99, (30, 3))
    sizes[[3, 4, 20]] = -1
    found = sizes_in_training(sizes)
    for index in range(30):
        tried = next(i for i in (substitute(index, attempt, 30) for attempt in range(ATTEMPTS)) if sizes[i, 0] >= 0)
        np.testing.assert_array_equal(found[index], sizes[tried])
    assert not sizes_in_training(np.full((3, 3), -1)).any()


def test_a_sample_that_is_too_long_has_the_size_of_what_is_read_instead() -> None:
    sizes = np.array([[10, 40, 25], [10, 90, 25], [10, 90, 120], [-1, -1, -1]])
    good = [10, 40, 25]
    np.testing.assert_array_equal(sizes_in_training(sizes, LengthLimit(80)), [good] * 4)
    lowered = sizes_in_training(sizes, LengthLimit(80, lower_fps=True))
    np.testing.assert_array_equal(lowered[:2], [good, [10, 45, 25]])
    assert (lowered.sum(axis=1) <= 80).all()
