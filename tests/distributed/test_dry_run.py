"""`train.py --dry-run`: one real step, no run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.distributed.programs import arguments, train, two_ranks

LORA = ("train.llm.mode=lora", "train.zero_stage=3", "train.offload.optimizer=true")


def said(output: str, name: str) -> int:
    """The number behind a name."""
    found = re.search(rf"^{name} +([\d,]+)", output, re.MULTILINE)
    assert found, output
    return int(found[1].replace(",", ""))


def check(output: str, run: Path) -> None:
    """What it says of a step, and that it leaves nothing."""
    kept = re.search(r"^video .* ([\d,]+) kept$", output, re.MULTILINE)
    assert kept, output
    assert 0 < int(kept[1].replace(",", "")) < said(output, "video")
    assert said(output, "trainable") < said(output, "frozen")
    assert re.search(r"^ +8  .* GiB with a fifth to spare$", output, re.MULTILINE)
    assert "Best step" not in output
    assert not run.exists() or not any(run.iterdir())


@pytest.mark.slow
def test_a_dry_run_says_what_a_run_will_need(clips: Path, tmp_path: Path):
    status, output = train(*arguments(clips, tmp_path / "run"), "--dry-run")
    assert status == 0, output
    check(output, tmp_path / "run")


@pytest.mark.slow
def test_a_dry_run_on_two_ranks_with_adapters(clips: Path, tmp_path: Path):
    (status, output), (other_status, other) = two_ranks(*arguments(clips, tmp_path / "run", *LORA), "--dry-run")
    assert (status, other_status) == (0, 0), output
    check(output, tmp_path / "run")
    assert "Memory of a rank" not in other
