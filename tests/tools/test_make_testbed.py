"""`tools/make_testbed.py`: how many clips of which split."""

from __future__ import annotations

import argparse

import pytest
from tools.make_testbed import parse_sizes


def test_sizes_by_split() -> None:
    assert parse_sizes("train=4,val=1") == {"train": 4, "val": 1}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train=4,val=0", "val needs at least one clip; leave it out"),
        ("train=-1", "train needs at least one clip"),
        ("trian=4", "unknown split trian; there are train, val, test"),
        ("train", "expected NAME=COUNT"),
    ],
)
def test_what_cannot_be_written_is_refused(text: str, told: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=told):
        parse_sizes(text)
