"""`tools/check_data.py` finds what training would stumble over, and counts what training would see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tools import check_data

from omnisieve.compressors import build_compressor
from omnisieve.data.dataset import MediaLoader, OmniDataset
from omnisieve.data.errors import DataError
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


def test_samples_that_cannot_have_their_ratio_are_named_with_the_cure(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_media(good.parent / "sound.mp4", MediaSpec(seconds=0.3, audio_seconds=20))
    good.write_text(good.read_text() + line("sound"))
    recipe = ["--config", str(good.parent / "recipe.yaml"), "--workers", "0", "data.audio.max_seconds=60"]
    fixed = [*recipe, "compressor.retained_ratio=0.35", "compressor.audio_ratio=0.3"]
    for arguments, status in (
        (recipe, 0),
        (fixed, 1),
        ([*fixed, "--ratio", "0.5"], 0),
        ([*recipe, "--ratio", "0.9"], 0),
    ):
        assert check_data.main([str(good), *arguments]) == status
        problems = {row["id"]: row["problem"] for row in report(good, "samples.jsonl") if row["problem"]}
        told = capsys.readouterr().out
        if not status:
            assert problems == {}
            continue
        assert set(problems) == {"sound"}
        assert problems["sound"]["kind"] == "unreachable"
        assert "reachable are" in problems["sound"]["reason"]
        assert "choose a ratio within reach" in problems["sound"]["action"]
        assert "| unreachable | 1 | " in told
        sizes = [json.loads(row) for row in (good.parent / "m.jsonl.check" / "sizes.jsonl").read_text().splitlines()]
        assert sum("null" in json.dumps(row) for row in sizes) >= 1


@pytest.mark.parametrize("recipe", [False, True])
def test_what_no_sample_may_hold_is_named_and_the_check_goes_on(good: Path, recipe: bool) -> None:
    Image.new("RGB", (3000, 4)).save(good.parent / "thin.png")
    write_media(good.parent / "thin.mp4", MediaSpec(seconds=0.5, width=1280, height=4))
    Image.new("RGB", (9, 9)).save(good.parent / "a.gif", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")])
    (good.parent / "folder.mp4").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(good.parent / "damaged.avif")
    content = (good.parent / "damaged.avif").read_bytes()
    (good.parent / "damaged.avif").write_bytes(content[:-800])
    names = {"thin.png": "unusable", "thin.mp4": "unusable", "a.gif": "animated", "folder.mp4": "missing",
             "damaged.avif": "corrupt", "a" * 5000 + ".mp4": "missing", "a\0.mp4": "missing"}  # fmt: skip
    for name in names:
        kind = "video" if name.endswith("mp4") else "image"
        row = {"id": name, "messages": [{"role": "user", "content": [{"type": kind, kind: name}]}]}
        good.write_text(good.read_text() + json.dumps(row) + "\n")
    good.write_text(good.read_text() + line("plain").replace("What?", "What is <|AUDIO|>?"))
    good.write_text(good.read_text() + line("data:video/mp4;base64," + "A" * 90_000))
    options = ["--config", str(good.parent / "recipe.yaml")] if recipe else []
    assert check_data.main([str(good), "--workers", "0", *options]) == 1
    found = {Path(row["path"]).name: row["problem"]["kind"] for row in report(good, "files.jsonl") if row["problem"]}
    assert found == names
    problems = [row["problem"] for row in report(good, "samples.jsonl") if row["problem"]]
    assert [problem["kind"] for problem in problems] == ["text", "manifest"]
    assert "<|AUDIO|>" in problems[0]["reason"]
    assert "is a data URL" in problems[1]["reason"]
    assert len(problems[1]["reason"]) < 500


def test_tokens_need_a_recipe(good: Path) -> None:
    with pytest.raises(SystemExit):
        check_data.main([str(good), "--max-tokens", "5"])


@pytest.mark.parametrize("name", ["files.jsonl", "samples.jsonl", "sizes.jsonl", "summary.md"])
@pytest.mark.parametrize(
    "content", ['{"mine": 1}\n', '{"path": "mine"}', "mine\n", "# Mine\n\nmine\n", "[" * 100_000, "\xe4"]
)
def test_a_report_replaces_nothing_but_a_report(good: Path, name: str, content: str) -> None:
    folder = good.parent / "report"
    folder.mkdir()
    (folder / name).write_text(content, "latin-1")
    with pytest.raises(DataError, match=rf"{name} is there and is no report of this program; move it"):
        check_data.main([str(good), "--workers", "0", "--report", str(folder)])
    assert [path.name for path in folder.iterdir()] == [name]
    assert (folder / name).read_text("latin-1") == content


def test_a_report_that_was_cut_short_and_gone_on_with_is_read(good: Path) -> None:
    assert check_data.main([str(good), "--workers", "0"]) == 0
    path = good.parent / "m.jsonl.check" / "files.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    for text in (rows[0] + rows[1][:9] + rows[2], rows[0] + rows[1][:9], rows[0][:5], "", rows[0] + "[]\n"):
        path.write_text(text)
        assert check_data.main([str(good), "--workers", "0"]) == 0
        assert path.read_text().splitlines(keepends=True) == rows


@pytest.mark.parametrize("place", ["m.jsonl", "m.jsonl/in", "/proc/x", "a" * 300])
def test_a_place_that_can_hold_no_report_is_one_message(good: Path, place: str) -> None:
    with pytest.raises(DataError, match="no report can be written there"):
        check_data.main([str(good), "--workers", "0", "--report", str(good.parent / place)])
