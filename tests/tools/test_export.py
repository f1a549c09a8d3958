"""`tools/export.py` copies the right compressor of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tools import export

from omnisieve.artifact import ArtifactError, load_compressor, read_config, save_compressor
from omnisieve.compressors import build_compressor


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training run whose best compressor is full of ones and whose last one is full of twos."""
    for name, value in (("best", 1.0), ("last", 2.0)):
        compressor = build_compressor("omnisift", hidden_size=8, width=8, heads=2, retained_ratio=0.25)
        for parameter in compressor.parameters():
            torch.nn.init.constant_(parameter, value)
        save_compressor(compressor, tmp_path / "run" / name, card={"steps": int(value)})
    return tmp_path / "run"


@pytest.mark.parametrize(("arguments", "value"), [([], 1), (["--which", "best"], 1), (["--which", "last"], 2)])
def test_exports_what_was_asked_for(run: Path, arguments: list[str], value: int) -> None:
    out = run / "export"
    assert export.main([str(run), str(out), *arguments]) == 0
    assert {float(p.detach().max()) for p in load_compressor(out).parameters()} == {value}
    assert read_config(out)["provenance"]["steps"] == value


def test_a_run_without_validation_exports_the_last(run: Path) -> None:
    (run / "best" / "config.json").unlink()
    export.main([str(run), str(run / "export")])
    assert read_config(run / "export")["provenance"]["kept from the run"] == "last"
    with pytest.raises(ArtifactError, match="--which last"):
        export.main([str(run), str(run / "export"), "--which", "best"])


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="output_dir of a training run"):
        export.main([str(tmp_path), str(tmp_path / "out")])
