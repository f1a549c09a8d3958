"""`tools/convert_data.py`: all entries, or none and a list of what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tools import convert_data

from omnisieve.data.errors import DataError
from omnisieve.data.manifest import Manifest


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two good rows, one whose file is missing and one without an answer."""
    (tmp_path / "media").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "media" / name).touch()
    path = tmp_path / "media" / "table.csv"
    path.write_text("id,path,question,answer\n7,a.mp4,Who?,Ann\n8,c.mp4,Who?,Bob\n9,b.mp4,Who?,\n10,b.mp4,Who?,Eve\n")
    return path


def test_bad_entries_are_listed_and_left_out_only_when_asked(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "m.jsonl"
    assert convert_data.main([str(table), str(out)]) == 1
    assert not out.exists()
    told = capsys.readouterr().err
    assert "line 3: " in told
    assert "2 of 4 entries cannot be used" in told
    assert "--skip-bad" in told
    listed = [json.loads(line) for line in (tmp_path / "new" / "m.jsonl.skipped.jsonl").read_text().splitlines()]
    assert [(entry["where"], entry["id"]) for entry in listed] == [("line 3", "8"), ("line 4", "9")]
    assert listed[1]["reason"] == "the answer, column 'answer', is empty"
    assert convert_data.main([str(table), str(out), "--skip-bad"]) == 0
    manifest = Manifest(out)
    assert [line.id for line in manifest] == ["7", "10"]
    manifest.check()
    assert json.loads(out.read_text().splitlines()[0])["messages"][0]["content"][0]["video"] == "../media/a.mp4"


def test_a_clean_run_leaves_no_list(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.jsonl"
    convert_data.main([str(table), str(out)])
    assert (tmp_path / "m.jsonl.skipped.jsonl").exists()
    table.write_text("path,question\na.mp4,Who?\n")
    assert convert_data.main([str(table), str(out)]) == 0
    assert not (tmp_path / "m.jsonl.skipped.jsonl").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.jsonl", "media"]


def test_a_folder_is_asked_one_question(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.jsonl"
    assert convert_data.main([str(table.parent), str(out), "--question", "What happens?"]) == 0
    lines = list(Manifest(out))
    assert [line.id for line in lines] == ["a.mp4", "b.mp4"]
    assert [part["text"] for line in lines for part in line.messages[0]["content"][1:]] == ["What happens?"] * 2
    assert all(len(line.messages) == 1 for line in lines)


def test_mistakes_on_the_command_line(table: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is the input itself"):
        convert_data.main([str(table), str(table)])
    with pytest.raises(DataError, match="write KEY=NAME, where KEY is one of path, question, answer"):
        convert_data.main([str(table), str(tmp_path / "m.jsonl"), "--columns", "file=path"])
    table.write_text("path,question\n")
    assert convert_data.main([str(table), str(tmp_path / "m.jsonl")]) == 1
