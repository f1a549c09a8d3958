"""`tools/bench.py`: what it counts and writes; how fast anything is depends on the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tools import bench

TINY = ["--seconds", "4", "--grid", "10", "12", "--layers", "9", "--hidden", "16", "--repeats", "2"]


def test_towers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four frames of 5 x 6 tokens make windows of 4 x 4, 4 x 2, 1 x 4 and 1 x 2; layer 7 of 9 sees whole frames."""
    path = tmp_path / "new" / "bench.json"
    assert bench.main(["towers", *TINY, "--out", str(path)]) == 0
    report = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert report["benchmark"] == "towers"
    assert report["clip"] == {"seconds": 4, "fps": 2, "patches_per_frame": [10, 12]}
    (found,) = report["widths"]
    # Of each layer, the windows of the picture and two pieces of sound.
    assert found["calls"] == {"stock": 8 * 4 * 4 + 4 + 9 * 2, "batched": 8 * 4 + 1 + 9}
    assert found["largest_difference"] < 1e-5
    assert {name: len(values) for name, values in found["runs"].items()} == {"stock": 2, "batched": 2}
    assert found.keys() == {"hidden", "calls", "seconds", "ratio", "runs", "largest_difference"}
    assert report["environment"].keys() == {"omnisieve", "torch", "transformers", "python", "cpu", "threads"}


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    size = ["--seconds", "2", "--size", "160", "96", "--repeats", "1", "--damaged", "3"]
    assert bench.main(["reading", *size, "--out", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [clip["b_frames"] for clip in report["clips"]] == [0, 3]
    assert all(clip["equal"] and clip["frames"] == 4 for clip in report["clips"])
    assert report["damaged"]["wrong by time stamps"] == 0
