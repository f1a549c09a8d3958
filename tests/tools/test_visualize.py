"""`tools/visualize.py` draws a real clip through the testbed's model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tools import visualize

from omnisieve.artifact import save_compressor
from omnisieve.compressors import CompressorError, build_compressor
from omnisieve.data.errors import DataError
from omnisieve.data.synthetic import manifest_text, write_clip
from omnisieve.training.pictures import WIDTH

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
model: {{path: {backbone}, dtype: float32}}
compressor: {{method: omnisift, retained_ratio: 0.25}}
data: {{train: {folder}/val.jsonl, feature_cache: {folder}/there_is_none}}
train: {{max_steps: 1}}
output_dir: {folder}/out
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, two clips, and an exported compressor."""
    folder = tmp_path_factory.mktemp("visualize")
    (folder / "videos").mkdir()
    for index in range(2):
        write_clip(("a", "val", index, str(folder / "videos")))
    (folder / "val.jsonl").write_text(manifest_text("a", "val", 2))
    backbone = ROOT / "data" / "testbed" / "backbone"
    (folder / "train.yaml").write_text(RECIPE.format(folder=folder, backbone=backbone))
    width = json.loads((backbone / "config.json").read_text())["text_config"]["hidden_size"]
    compressor = build_compressor("omnisift", hidden_size=width, width=16, heads=2, retained_ratio=0.25)
    save_compressor(compressor, folder / "export", card={})
    return folder


def draw(folder: Path, *words: str) -> np.ndarray:
    output = folder / "out.png"
    assert visualize.main(["--config", str(folder / "train.yaml"), "--output", str(output), *words]) == 0
    return np.asarray(Image.open(output))


def test_an_exported_compressor_and_a_method_are_drawn(folder: Path) -> None:
    own = draw(folder, "--compressor", str(folder / "export"), "--clip", "1")
    full = draw(folder, "--compressor", "full", "--ratio", "1", "--clip", "1")
    stvp = draw(folder, "--compressor", "stvp", "--ratio", "0.25", "--clip", "1")
    assert own.shape == full.shape == stvp.shape
    assert own.shape[1] == WIDTH
    # The more tokens stay, the brighter.
    assert own.mean() < full.mean()
    assert stvp.mean() < full.mean()


@pytest.mark.parametrize(
    ("words", "error", "reason"),
    [
        (["--compressor", "stvp"], CompressorError, "give --ratio"),
        (["--compressor", "seats", "--ratio", "0.25"], CompressorError, "inside the LLM"),
        (["--compressor", "oracle", "--ratio", "0.25"], CompressorError, "cannot be drawn"),
        (["--compressor", "stvp", "--ratio", "0.25", "--clip", "2"], DataError, "has 2 clips"),
    ],
)
def test_what_cannot_be_drawn_is_named(folder: Path, words: list[str], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        draw(folder, *words)


def test_an_unknown_format_is_refused_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        draw(folder, "--compressor", "nothing", "--output", "clip.svg")
    assert "must be one of .png" in capsys.readouterr().err
