"""`tools/check_data.py` finds what training would stumble over, and counts what training would see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tools import check_data

from omnisieve.compressors import build_compressor
from omnisieve.data.dataset import MediaLoader, OmniDataset
from omnisieve.data.manifest import Manifest
from omnisieve.data.preprocess import Preprocessor
from omnisieve.data.sizes import read_sizes
from omnisieve.layout import TokenLayout
from tests.data.media_files import FAULTS, MediaSpec, write_faulty, write_media
from tests.data.stock import BACKBONE, rules, stock_processor

RECIPE = f"""
model: {{path: {BACKBONE}, dtype: float32}}
compressor: {{method: omnisift, retained_ratio: 0.25, width: 16, heads: 2}}
data: {{train: none.jsonl, max_frames: 6, min_pixels: 3136, max_pixels: 6272, audio: {{max_seconds: 3}}}}
train: {{max_steps: 1}}
output_dir: none
"""
GOOD = {
    "plain": {"seconds": 2.0},
    "long": {"seconds": 4.0, "audio_start": 0.5},
    "silent": {"seconds": 2.0, "audio_seconds": 0.0},
}


def line(name: str, **keys: Any) -> str:
    messages = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "A clip."}]
    return json.dumps({"id": name, "messages": messages, "videos": [f"{name}.mp4"], **keys}) + "\n"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    for name, spec in GOOD.items():
        write_media(tmp_path / f"{name}.mp4", MediaSpec(**spec))
    path = tmp_path / "m.jsonl"
    path.write_text("".join(map(line, GOOD)))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return path


def report(path: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (path.parent / f"{path.name}.check" / name).read_text().splitlines()]


def kinds(row: dict[str, Any]) -> list[str]:
    return [remark["kind"] for remark in row["notes"]]


def test_tokens_are_those_that_training_sees(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(good), "--config", str(good.parent / "recipe.yaml"), "--workers", "0", "--max-tokens", "150"]
    assert check_data.main(arguments) == 0
    loader = MediaLoader(
        Preprocessor(stock_processor(), rules(), min_pixels=3136, max_pixels=6272), max_frames=6, audio_seconds=3.0
    )
    compressor = build_compressor("omnisift", hidden_size=64, retained_ratio=0.25, width=16, heads=2)
    for row, sample in zip(report(good, "samples.jsonl"), OmniDataset(Manifest(good), loader), strict=True):
        layout = TokenLayout.stack([sample.tokens], ids_per_window=rules().ids_per_chunk)
        assert row["id"] == sample.id
        assert row["tokens"] == pytest.approx(len(sample.input_ids), abs=2)
        assert row["tokens"] - row["tokens_after"] == pytest.approx(
            int((sample.tokens.item >= 0).sum()) - int(compressor.budget(layout).total[0]), abs=2
        )
        assert ("too_long" in kinds(row)) == (row["tokens"] > 150)
    sizes = read_sizes(good.parent / "m.jsonl.check" / "sizes.jsonl", good, loader.preprocessing(""))
    assert sizes.sum(axis=1).tolist() == [row["tokens"] for row in report(good, "samples.jsonl")]
    assert sizes[:, 1].tolist() == [row["video_tokens"] for row in report(good, "samples.jsonl")]
    loader.reader.close()
    files = {Path(row["path"]).stem: row for row in report(good, "files.jsonl")}
    assert kinds(files["plain"]) == []
    assert kinds(files["long"]) == ["thinned", "long_sound", "late_sound"]
    assert kinds(files["silent"]) == ["silent"]
    assert files["plain"]["streams"] == ["video/h264", "audio/aac"]
    told = capsys.readouterr().out
    assert told == (good.parent / "m.jsonl.check" / "summary.md").read_text() + "\n"
    assert "3 samples, 3 media files, 0.00 hours; 0 broken." in told
    assert "| before compression | " in told


@pytest.mark.parametrize("workers", [0, 2])
def test_every_fault_and_wrong_line_is_found(good: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    for fault in FAULTS:
        write_faulty(good.parent / f"{fault}.mp4", fault)
    good.write_text(good.read_text() + "".join(map(line, FAULTS)) + line("plain", videos=[]) + "{\n")
    assert check_data.main([str(good), "--workers", str(workers)]) == 1
    files = {Path(row["path"]).stem: row["problem"] and row["problem"]["kind"] for row in report(good, "files.jsonl")}
    assert files == dict.fromkeys(GOOD) | FAULTS
    wrong = [row["problem"]["reason"] for row in report(good, "samples.jsonl") if row["problem"]]
    assert ["line 12" in wrong[0], "line 13" in wrong[1], len(wrong)] == [True, True, 2]
    assert "13 samples, 11 media files, 0.00 hours; 10 broken." in capsys.readouterr().out


def test_a_second_run_looks_at_what_changed_only(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_faulty(good.parent / "long.mp4", "half")
    assert check_data.main([str(good), "--workers", "0"]) == 1
    looked: list[str] = []
    look = check_data.Files.look
    monkeypatch.setattr(check_data.Files, "look", lambda self, part: looked.append(part.path.stem) or look(self, part))
    write_media(good.parent / "long.mp4", MediaSpec(seconds=1.0))
    write_media(good.parent / "silent.mp4", MediaSpec(seconds=1.0))
    cut = good.parent / "m.jsonl.check" / "files.jsonl"
    cut.write_text(cut.read_text() + '{"path": "cut sh')
    assert check_data.main([str(good), "--workers", "0"]) == 0
    assert looked == ["long", "silent"]
    looked.clear()
    assert check_data.main([str(good), "--workers", "0", "--decode"]) == 0
    assert looked == ["plain", "long", "silent"]


def test_decoding_finds_damage_inside(good: Path) -> None:
    path = good.parent / "plain.mp4"
    write_media(path, MediaSpec(seconds=0.0, audio_seconds=2.0))
    content = bytearray(path.read_bytes())
    good.write_text(line("plain").replace("video", "audio"))
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[start:end] = np.random.default_rng(0).bytes(end - start)
    path.write_bytes(content)
    assert check_data.main([str(good), "--workers", "0"]) == 0
    assert check_data.main([str(good), "--workers", "0", "--decode"]) == 1


def test_tokens_need_a_recipe(good: Path) -> None:
    with pytest.raises(SystemExit):
        check_data.main([str(good), "--max-tokens", "5"])
