"""Clips that runs of `train.py` read."""

from __future__ import annotations

from pathlib import Path

import pytest

from omnisieve.data.synthetic import manifest_text, write_clip

CLIPS = {"train": 4, "val": 3}


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    (folder / "videos").mkdir()
    for split, count in CLIPS.items():
        for index in range(count):
            write_clip(("a", split, index, str(folder / "videos")))
        (folder / f"{split}.jsonl").write_text(manifest_text("a", split, count))
    return folder
