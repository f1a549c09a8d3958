from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnisieve.data.manifest import Manifest, ManifestError, MediaPart, no_path

ANSWER = {"role": "assistant", "content": "red"}


def manifest(folder: Path, *lines: Any) -> Manifest:
    path = folder / "m.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return Manifest(path)


def user(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def test_parts_and_tags_mean_the_same(tmp_path: Path) -> None:
    as_parts = user([{"type": "video", "video": "v/a.mp4"}, {"type": "text", "text": "What?"}])
    lines = manifest(
        tmp_path,
        {"id": "x", "messages": [as_parts, ANSWER]},
        {"id": "x", "messages": [user("<video>What?"), ANSWER], "videos": ["v/a.mp4"]},
    )
    assert lines[0] == replace(lines[1], id="x")
    assert lines[0].media == (MediaPart("video", tmp_path / "v/a.mp4"),)
    assert lines[0].messages[0]["content"] == [{"type": "video"}, {"type": "text", "text": "What?"}]


def test_mixed_lines_keep_their_own_keys(tmp_path: Path) -> None:
    lines = manifest(
        tmp_path,
        {"messages": [user("Hi"), ANSWER], "evidence": {"video": [[0, 1, 2]]}, "level": 3},
        "",
        {"id": 7, "messages": [user([{"type": "audio", "audio": "/abs/b.wav"}], family="tone"), ANSWER]},
        {
            "messages": [user([{"type": "video", "video": "a.webm", "fps": 1, "max_frames": 8}]), ANSWER],
            "level": "high",
        },
    )
    assert len(lines) == 3
    assert lines[0].id == "1"
    assert lines[0].meta == {"evidence": {"video": [[0, 1, 2]]}, "level": 3}
    assert lines[1].id == "7"
    assert lines[1].media[0].path == Path("/abs/b.wav")
    assert lines[1].messages[0]["family"] == "tone"
    assert lines[2].id == "4"
    assert (lines[2].media[0].fps, lines[2].media[0].max_frames) == (1, 8)
    assert [line.id for line in lines[1:]] == ["7", "4"]


def test_several_media_are_taken_in_the_order_of_their_tags(tmp_path: Path) -> None:
    line = manifest(
        tmp_path,
        {
            "messages": [user("<image><video>and<audio><video>?"), ANSWER],
            "videos": ["1.mp4", "2.mp4"], "audios": ["3.wav"], "images": ["4.png"],
        },
    )[0]  # fmt: skip
    assert [part.path.name for part in line.media] == ["4.png", "1.mp4", "3.wav", "2.mp4"]


def test_answers_may_contain_tags(tmp_path: Path) -> None:
    line = manifest(tmp_path, {"messages": [user("Say it"), {"role": "assistant", "content": "<video>"}]})[0]
    assert line.messages[1]["content"] == "<video>"


def test_questions_stand_alone(tmp_path: Path) -> None:
    line = manifest(
        tmp_path,
        {
            "id": "c",
            "evidence": {"audio": [4]},
            "messages": [
                {"role": "system", "content": "Be brief."},
                user([{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "One?"}], family="f1"),
                {"role": "assistant", "content": "1"},
                user("Two?", family="f2"),
                {"role": "assistant", "content": "2"},
                user("Unanswered?"),
            ],
        },
    )[0]
    one, two = line.questions()
    assert one.meta == {"evidence": {"audio": [4]}, "family": "f1", "question": "One?", "answer": "1", "turn": 0}
    assert two.meta["family"] == "f2"
    assert (two.meta["answer"], two.meta["turn"]) == ("2", 1)
    assert two.media == line.media
    assert [m["role"] for m in two.messages] == ["system", "user"]
    assert two.messages[1]["content"] == [{"type": "video"}, {"type": "text", "text": "Two?"}]


def test_null_counts_as_absent(tmp_path: Path) -> None:
    part = {"type": "video", "video": "a.mp4", "fps": None, "max_frames": None, "text": None}
    nulls = {
        "id": None,
        "images": None,
        "audios": None,
        "system": None,
        "level": None,
        "spans": {"a": None, "b": [None]},
    }
    lines = manifest(
        tmp_path,
        {**nulls, "messages": [user([part, {"type": "text", "text": "?", "video": None}], loss=None), ANSWER]},
        {"id": float("nan"), "messages": [user("<video>?"), {**ANSWER, "loss": None}], "videos": ["a.mp4"]},
    )
    assert [line.id for line in lines] == ["1", "2"]
    assert lines[0].messages == lines[1].messages
    assert lines[0].media == lines[1].media == (MediaPart("video", tmp_path / "a.mp4"),)
    assert (lines[0].meta, lines[1].meta) == ({"spans": {"b": [None]}}, {})


def test_byte_order_marks_are_no_content(tmp_path: Path) -> None:
    line = json.dumps({"id": "x", "messages": [user("Hi"), ANSWER]})
    (tmp_path / "m.jsonl").write_text(f"\ufeff{line}\n\ufeff\n\ufeff{line}\n", "utf-8")
    assert [found.id for found in Manifest(tmp_path / "m.jsonl")] == ["x", "x (line 3)"]


def test_every_line_has_an_id_of_its_own_that_lasts(tmp_path: Path) -> None:
    given = [7, "7", None, "4", "b", "b", "b (line 6)", "b", ""]
    lines = [{"id": name, "messages": [user("Hi")]} for name in given]
    ids = [
        line.id
        for line in manifest(tmp_path, *lines, {"messages": [user("Hi")]}, {"id": "11", "messages": []}, "{")[:10]
    ]
    assert ids == ["7", "7 (line 2)", "3", "4", "b", "b (line 6)'", "b (line 6)", "b (line 8)", "9", "10"]
    assert [line.id for line in Manifest(tmp_path / "m.jsonl")[:10]] == ids


@given(st.lists(st.none() | st.sampled_from(["1", "2", "3", "2 (line 3)", "a", 2]), min_size=1, max_size=8))
def test_ids_are_unique(names: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = manifest(Path(folder), *({"id": name, "messages": [user("Hi")]} for name in names))
        ids = [line.id for line in lines]
    assert len(set(ids)) == len(ids)
    for index, name in enumerate(names):
        if name is not None and str(name) not in map(str, names[:index]):
            assert ids[index] == str(name)


def test_the_key_system_is_a_message_before_all_others(tmp_path: Path) -> None:
    spoken = {"role": "system", "content": "Be brief."}
    lines = manifest(
        tmp_path,
        {"messages": [user("Hi"), ANSWER], "system": "Be brief."},
        {"messages": [spoken, user("Hi"), ANSWER], "system": "Be brief."},
        {"messages": [spoken, user("Hi"), ANSWER], "system": ""},
        {"messages": [spoken, user("Hi"), ANSWER], "system": "Be long."},
        {"messages": [user("Hi")], "system": ["a"]},
        {"messages": [user(3)], "system": "a"},
    )
    for line in lines[:3]:
        assert line.messages == (spoken, user("Hi"), ANSWER)
        assert line.meta == {}
        assert [question.messages[0] for question in line.questions()] == [spoken]
    for index, told in ((3, "'system': the messages have another"), (4, "'system': a string"), (5, r"messages\[0\]")):
        with pytest.raises(ManifestError, match=told):
            lines[index]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": [user("?"), {**ANSWER, "loss": 0}]}, r"key 'messages\[1\].loss': true or false"),
        ({"messages": [user("?", loss=True)]}, r"key 'messages\[0\].loss': only assistant messages are learnt"),
        ('{"messages": [', r"line 2: no valid JSON"),
        ("[1]", r"line 2: a JSON object is needed, this is a list"),
        ({"mesages": []}, r"line 2, key 'messages': missing.*is 'mesages' meant\?"),
        ({"conversations": []}, r"line 2, key 'messages': .*ShareGPT"),
        ({"messages": []}, r"key 'messages': a non-empty list"),
        ({"messages": [{"role": "human", "content": ""}]}, r"key 'messages\[0\].role': one of system, user, assistant"),
        ({"messages": [user(3)]}, r"key 'messages\[0\].content': a string or a list"),
        ({"messages": [user([{"type": "vidio"}])]}, r"key 'messages\[0\].content\[0\].type'.*'vidio'"),
        ({"messages": [user([{"type": "video"}])]}, r"key 'messages\[0\].content\[0\].video': the path"),
        (
            {"messages": [user([{"type": "video", "vidoe": "a"}])]},
            r"\.vidoe': unknown; the keys of video parts are type, v",
        ),
        ({"messages": [user([{"type": "video", "video": "a", "fps": 0}])]}, r"\.fps': a positive number"),
        (
            {"messages": [user([{"type": "video", "video": "a", "max_frames": 1.5}])]},
            r"\.max_frames': a positive integer",
        ),
        (
            {"messages": [user([{"type": "audio", "audio": "a", "fps": 1}])]},
            r"\.fps': unknown; the keys of audio parts are type, audio, audio_track$",
        ),
        ({"messages": [user("<video>?")]}, r"key 'videos': fewer files than <video> tags"),
        ({"messages": [user("?")], "videos": ["a"]}, r"key 'videos': more files than <video> tags"),
        ({"messages": [user("?")], "audios": "a.wav"}, r"key 'audios': a list of paths"),
        (
            {"messages": [user("<audio>?")], "audios": ["file:///b.wav"]},
            r"key 'audios\[0\]': file:///b.wav is a file URL",
        ),
        ({"messages": [user([{"type": "video", "video": "s3://a/b"}])]}, r"\.video': s3://a/b is an address; download"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "video", "video": "a", "fps": NaN}]}]}',
            "a positive number",
        ),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', r"line 2: half a character .*\\ud83d"),
        ('{"messages": ' + "[" * 100_000, "line 2: no valid JSON"),
        ('{"messages": ' + "1" * 5000 + "}", "line 2: no valid JSON"),
        (
            {"messages": [user("?"), {"role": "assistant", "content": [{"type": "image", "image": "a"}]}]},
            r"key 'messages\[1\].content': media belong to user messages",
        ),
    ],
)
def test_a_wrong_line_names_file_line_and_key(tmp_path: Path, line: Any, message: str) -> None:
    lines = manifest(tmp_path, {"messages": [user("Hi"), ANSWER]}, line)
    assert lines[0].media == ()
    with pytest.raises(ManifestError, match=message) as caught:
        lines.check()
    assert str(tmp_path / "m.jsonl") in str(caught.value)


def test_missing_media_are_named_with_line_and_cure(tmp_path: Path) -> None:
    (tmp_path / "there.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    names = ["there.mp4", "a.mp4", "b.mp4", "a.mp4", "folder.mp4", "c.mp4"]
    lines = manifest(tmp_path, *({"messages": [user("<video>?"), ANSWER], "videos": [name]} for name in names))
    lines.check(1)
    with pytest.raises(ManifestError) as caught:
        lines.check()
    told = str(caught.value)
    assert told.startswith(f"{tmp_path}/m.jsonl: 4 of 5 media files are missing: line 2: {tmp_path}/a.mp4; line 3: ")
    assert "line 5: " in told
    assert "; and 1 more. Correct the paths" in told
    assert "c.mp4" not in told


def test_a_path_that_the_system_refuses_is_the_error_of_its_sample(tmp_path: Path) -> None:
    for name in ("a" * 5000 + ".mp4", "a\0.mp4"):
        lines = manifest(tmp_path, {"messages": [user("<video>?"), ANSWER], "videos": [name]})
        assert lines.check() == []


BASE64 = "AAAAIGZ0eXBpc29tAAACAGlzb21pc28yYXZjMW1wNDEAAAAIZnJlZQAB" * 100


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it is empty"),
        ("https://example.org/a.mp4", "is an address; download the file and give its path"),
        ("HTTP://example.org/a.mp4", "is an address"),
        ("gs://bucket/a.mp4", "is an address"),
        ("file:///data/my%20clip.mp4", "is a file URL; give the path alone, /data/my clip.mp4"),
        (f"data:video/mp4;base64,{BASE64}", "is a data URL, the content itself; write it to a file"),
        (BASE64, "looks like base64, the content itself; write it to a file"),
        (BASE64 + "==", "looks like base64"),
    ],
)
def test_what_is_no_path_is_named_in_short(text: str, told: str) -> None:
    found = no_path(text)
    assert found is not None
    assert told in found
    assert len(found) < 200


@pytest.mark.parametrize("text", ["a.mp4", "/a/b c.mp4", "12:30.mp4", "C:/a.mp4", "data.mp4", "file.mp4", "data",
                                  "%03d.png", "a/" * 200 + "b.mp4", "concat:a|b", "a" * 5000,
                                  "video " * 50 + ".mp4"])  # fmt: skip
def test_any_name_may_be_a_path(text: str) -> None:
    assert no_path(text) is None


def test_marks_of_templates_are_said_when_the_manifest_is_read(tmp_path: Path) -> None:
    good, bad = {"messages": [user("Hi"), ANSWER]}, {"messages": [user("What is <|VIDEO|>?"), ANSWER]}
    assert manifest(tmp_path, good).check() == []
    (remark,) = manifest(tmp_path, good, bad, good, bad, bad, bad).check()
    assert remark.startswith(f"{tmp_path}/m.jsonl: 4 of 6 samples cannot be used: line 2: the text holds <|VIDEO|>")
    assert "; and 1 more. Correct the texts" in remark
    with pytest.raises(ManifestError, match="1 of 1 samples cannot be used"):
        manifest(tmp_path, bad).check()
    assert manifest(tmp_path, good, bad).check(1) == []


def test_unusual_line_separators_are_content(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(
        json.dumps({"messages": [user("a\u2028b\x85")]}, ensure_ascii=False).encode() + b"\r\n\n" + b'{"messages": []}'
    )
    lines = Manifest(tmp_path / "m.jsonl")
    assert len(lines) == 2
    assert lines[0].messages[0]["content"] == "a\u2028b\x85"
    with pytest.raises(ManifestError, match="line 3, key 'messages'"):
        lines[-1]
    (tmp_path / "m.jsonl").write_bytes('{"messages": "ä"}'.encode("latin-1"))
    with pytest.raises(ManifestError, match="not UTF-8"):
        Manifest(tmp_path / "m.jsonl")


def test_missing_and_empty_manifests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such manifest"):
        Manifest(tmp_path / "none.jsonl")
    with pytest.raises(ManifestError, match="has no lines"):
        manifest(tmp_path, "", "")


def test_a_part_may_name_a_sound_track(tmp_path: Path) -> None:
    parts = [
        {"type": "video", "video": "a.mkv", "audio_track": 1},
        {"type": "audio", "audio": "b.mka", "audio_track": 0},
    ]
    (line,) = manifest(tmp_path, {"messages": [user([*parts, {"type": "text", "text": "?"}]), ANSWER]})
    assert [part.audio_track for part in line.media] == [1, 0]


@pytest.mark.parametrize("track", [-1, 1.0, True, "1"])
def test_a_sound_track_is_a_number_from_0_on(tmp_path: Path, track: object) -> None:
    part = {"type": "video", "video": "a.mkv", "audio_track": track}
    with pytest.raises(ManifestError, match=r"audio_track': the number of a sound track, from 0 on, is needed"):
        manifest(tmp_path, {"messages": [user([part, {"type": "text", "text": "?"}]), ANSWER]})[0]
