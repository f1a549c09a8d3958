"""`tools/convert_data.py`: all entries, or none and a list of what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tools import convert_data

from omnisieve.data.errors import DataError
from omnisieve.data.manifest import Manifest
from tests.data.media_files import MediaSpec, write_media


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


def test_nothing_but_a_manifest_is_replaced(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.jsonl"
    for other in ("notes", '["messages"]\n', '{"video": "a.mp4"}\n'):
        out.write_text(other)
        with pytest.raises(DataError, match=r"m\.jsonl is there and is no manifest"):
            convert_data.main([str(table), str(out), "--skip-bad"])
        assert out.read_text() == other
    out.unlink()
    (tmp_path / "m.jsonl.tmp").write_text("mine")
    listed = tmp_path / "m.jsonl.skipped.jsonl"
    listed.write_text("mine")
    with pytest.raises(DataError, match=r"skipped\.jsonl is there, where unusable entries are listed"):
        convert_data.main([str(table), str(out), "--skip-bad"])
    listed.unlink()
    for _ in range(2):
        assert convert_data.main([str(table), str(out), "--skip-bad"]) == 0
    assert (tmp_path / "m.jsonl.tmp").read_text() == "mine"


def test_mistakes_on_the_command_line(table: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is the input itself"):
        convert_data.main([str(table), str(table)])
    with pytest.raises(DataError, match="write KEY=NAME, where KEY is one of path, question, answer"):
        convert_data.main([str(table), str(tmp_path / "m.jsonl"), "--columns", "file=path"])
    table.write_text("path,question\n")
    assert convert_data.main([str(table), str(tmp_path / "m.jsonl")]) == 1


def test_entries_without_an_answer_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ({"answerKey": "B"}, {"correct_answer": "A"}, {"Label": 1}, {"id": "x", "text": "y"}, {"answer": "z"})
    rows = [{"path": "a.mp4", "question": "Who?", **key} for key in keys]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    arguments = [str(tmp_path / "in.json"), str(tmp_path / "m.jsonl"), "--allow-missing"]
    assert convert_data.main(arguments) == 0
    last = capsys.readouterr().err.splitlines()[-3:]
    assert last[0].endswith("m.jsonl: 5 entries")
    assert last[1] == "4 entries have no answer"
    assert last[2].startswith("is one of these columns the answer: 'Label', 'answerKey', 'correct_answer'? Name it")
    assert "--columns answer=NAME" in last[2]
    (tmp_path / "in.json").write_text(json.dumps(rows[-2:]))
    assert convert_data.main(arguments) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "1 entry has no answer"


@pytest.mark.parametrize("name", ["/proc/x/m.jsonl", "a" * 300 + ".jsonl", "media/a.mp4/m.jsonl", "media"])
def test_a_place_that_cannot_be_written_is_one_message(table: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"cannot be written|is no manifest") as caught:
        convert_data.main([str(table), str(tmp_path / name), "--skip-bad"])
    assert "\n" not in str(caught.value)


def test_half_a_character_is_listed_as_an_escape(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": "\\ud83d", "path": "a.mp4", "question": "Who?"}\n')
    assert convert_data.main([str(tmp_path / "in.jsonl"), str(tmp_path / "m.jsonl")]) == 1
    (listed,) = (tmp_path / "m.jsonl.skipped.jsonl").read_text("utf-8").splitlines()
    assert json.loads(listed)["id"] == "\ud83d"
    assert convert_data.main([str(tmp_path / "in.jsonl"), str(tmp_path / "m.jsonl")]) == 1


@pytest.mark.parametrize("asked", ["<video><audio>Who?", "<video>\n<audio>Who?", "<audio><video>Who?"])
def test_sound_beside_its_video_is_heard_once(asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video, silent = written(tmp_path / "clip.mp4"), written(tmp_path / "silent.mp4", audio_seconds=0)
    file = {"seconds": 0.0, "audio_codec": "pcm_s16le"}
    same = written(tmp_path / "same.wav", audio_seconds=4.0, **file)
    other = written(tmp_path / "other.wav", audio_seconds=1.5, **file)
    parts = [{"type": "video", "video": str(video)}, {"type": "audio", "audio": str(same)}]
    rows = [
        {"messages": [user(asked)], "videos": [str(video)], "audios": [str(same)]},
        {"messages": [user(asked)], "videos": [str(video)], "audios": [str(other)]},
        {"messages": [user(asked)], "videos": [str(silent)], "audios": [str(same)]},
        {"messages": [user("<video>Who?<audio>")], "videos": [str(video)], "audios": [str(same)]},
        {"messages": [user(f"{asked}<audio>")], "videos": [str(video)], "audios": [str(same), str(other)]},
        {"messages": [user([*parts, {"type": "text", "text": "Who?"}])]},
        {"video": str(video), "audio": str(same), "question": "Who?"},
        {
            "messages": [user("<video>Who?"), said("Ann"), user("<audio>Why?"), said("So.")],
            "videos": [str(video)],
            "audios": [str(same)],
        },
        {"messages": [user("<audio>One <audio>two <video>Who?")], "videos": [str(video)], "audios": [str(same)] * 2},
    ]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    out = tmp_path / "m.jsonl"
    assert convert_data.main([str(tmp_path / "in.json"), str(out)]) == 0
    told = capsys.readouterr().err
    assert told.count("would be heard twice") == told.count("of another length") == 1
    assert "7 entries have a video with sound and, beside it, a sound file of the same length" in told
    assert "The video's own is kept, the file is left out; --sound both keeps both" in told
    sounds = [[part.path.name for part in line.media if part.kind == "audio"] for line in Manifest(out)]
    assert sounds == [[], ["other.wav"], ["same.wav"], [], ["other.wav"], [], [], [], ["same.wav"]]
    assert convert_data.main([str(tmp_path / "in.json"), str(out), "--sound", "both"]) == 0
    assert "sound" not in capsys.readouterr().err.replace(str(tmp_path), "")
    assert sum(part.kind == "audio" for line in Manifest(out) for part in line.media) == 11


def written(path: Path, **spec: Any) -> Path:
    return write_media(path, MediaSpec(**spec))


def said(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}
