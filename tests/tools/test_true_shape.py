"""`tools/true_shape.py` at the true widths of 3B with one layer of its LLM."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from tools import true_shape


@pytest.mark.slow
def test_one_layer_goes_all_the_way(tmp_path: Path) -> None:
    try:
        importlib.metadata.distribution("dashscope")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("see CONTRIBUTING.md: slow tests")
    out = tmp_path / "figures.json"
    assert true_shape.main(["--shape", "3b", "--layers", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert (report["model"]["layers"], report["model"]["hidden_size"]) == (1, 2048)
    assert report["tokens"]["video kept"] == pytest.approx(report["tokens"]["video"] / 4, abs=1)
    assert report["measured_ratios"][0]["total"] == 1
    assert [ratio["total"] for ratio in report["measured_ratios"][1:]] == pytest.approx([0.25, 0.25], abs=0.01)
    assert report["programs"].keys() == {
        "dry_run", "train", "resume", "cache", "train_from_cache", "export", "evaluate",
    }  # fmt: skip
    assert abs(report["memory"]["estimate_minus_measured_percent"]) < 25
