"""`tools/import_omnisift.py` writes an export, and says what it left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools import import_omnisift

from omnisieve import load_compressor
from omnisieve.artifact import CARD_FILE
from tests.test_published import sharded, state


def test_a_checkpoint_becomes_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, out = sharded(state(), tmp_path / "OmniSIFT-7B"), tmp_path / "out"
    assert import_omnisift.main([str(checkpoint), str(out), "--preset", "omnisift/7b/35"]) == 0
    said = capsys.readouterr().out
    assert "at the ratios of omnisift/7b/35" in said
    assert "LLM not imported" in said
    loaded = load_compressor(out)
    assert (loaded.settings.video_ratio, loaded.settings.audio_ratio) == (0.33, 0.60)
    assert f"| imported from | {checkpoint} |" in (out / CARD_FILE).read_text()


def test_a_preset_of_another_method_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        import_omnisift.main([str(tmp_path), str(tmp_path / "out"), "--preset", "seats/7b/35"])
    assert "invalid choice: 'seats/7b/35'" in capsys.readouterr().err
