"""Data sets in other layouts become messages, and nothing gets lost."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnisieve.data.formats import Columns, Converter, Skipped, to_messages
from omnisieve.data.manifest import Conversation, parse_line
from omnisieve.data.sources import Entry, FormatError, read_entries, source_of


def conversation(row: dict[str, Any], *, folder: Path = Path("/d"), **options: Any) -> Conversation:
    """What the manifest reader makes of a converted row; files need not be there."""
    converter = Converter(folder / "m.jsonl", folder / "media", allow_missing=True, **options)
    line = converter.convert(Entry("line 7", row))
    assert isinstance(line, str), line
    return parse_line(line, folder / "m.jsonl", 1)


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


def content(found: Conversation, turn: int = 0) -> list[Any]:
    return [part.get("text", part["type"]) for part in found.messages[turn]["content"]]


def test_sharegpt_turns_and_placeholders() -> None:
    found = conversation(
        {
            "id": "a",
            "conversations": turns("<video>\nWho <audio> is it?", "Ann", "And <image>?", "Bob\n<video>"),
            "videos": ["v.mp4"],
            "audio": "a.wav",
            "images": ["i.png"],
            "system": "Be brief.",
            "source": "x",
        }
    )
    assert found.id == "a"
    assert found.meta == {"source": "x"}
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert content(found, 1) == ["video", "Who ", "audio", " is it?"]
    assert found.messages[4]["content"] == "Bob\n<video>"  # an answer may say so
    assert [(part.kind, part.path) for part in found.media] == [
        ("video", Path("/d/media/v.mp4")), ("audio", Path("/d/media/a.wav")), ("image", Path("/d/media/i.png")),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"path": "v.mp4", "conversations": turns("What?", "That.")},
        {"video": "v.mp4", "messages": [{"role": "user", "content": "What?"}]},
    ],
)
def test_a_file_that_would_not_be_read_is_named(row: dict[str, Any]) -> None:
    found = Converter(Path("/d/m.jsonl"), Path("/d"), allow_missing=True).convert(Entry("line 7", row))
    assert isinstance(found, Skipped)
    assert found.reason.startswith(f"the file in {next(iter(row))!r} would not be read")


@pytest.mark.parametrize("value", ["<image>\nWhat?", "<video>\nWhat?", "What?", "What?\n<video>"])
def test_llava_video_writes_its_placeholder_in_several_ways(value: str) -> None:
    found = conversation({"id": 3, "conversations": turns(value, "That."), "video": "v.mp4", "data_source": "y"})
    assert found.id == "3"
    assert sorted(content(found)) == ["What?", "video"]
    assert (content(found)[0] == "What?") == value.endswith("<video>")
    assert found.meta == {"data_source": "y"}


def test_media_without_placeholders_go_before_the_first_question() -> None:
    found = conversation({"conversations": turns("One?", "1", "Two?", "2"), "video": ["a.mp4", "b.mp4"]})
    assert content(found) == ["video", "video", "One?"]
    assert found.messages[2]["content"] == "Two?"


def test_a_table_row_by_its_columns() -> None:
    row = {"id": "q", "path": "a.mp4", "question": "Is it <video>?", "answer": "no", "level": "3"}
    found = conversation(row)
    assert content(found) == ["video", "Is it <video>?"]
    assert found.messages[1] == {"role": "assistant", "content": "no"}
    assert (found.id, found.meta) == ("q", {"level": "3"})
    named = {"file": "a.flac", "q": "?", "label": "x", "id": "q"}
    found = conversation(named, columns=Columns("file", "q", "label"))
    assert found.media[0].kind == "audio"
    assert found.messages[1]["content"] == "x"
    assert conversation({"audio": "talk.mp4", "question": "?"}).media[0].kind == "audio"


def test_a_row_without_an_answer_column_is_unlabelled() -> None:
    found = conversation({"path": "a.mp4"}, question="What?")
    assert [message["role"] for message in found.messages] == ["user"]
    assert found.id == "line 7"


def test_conversations_of_role_and_content() -> None:
    turn = {"role": "user", "content": "<image>\nWhat?"}
    found = conversation(
        {"conversations": [turn, {"role": "assistant", "content": "That.", "loss": False}], "image": "i.png"}
    )
    assert content(found) == ["image", "What?"]
    assert found.messages[1] == {"role": "assistant", "content": "That.", "loss": False}
    parts = [{"type": "video", "video": "v.mp4"}, {"type": "text", "text": "What?"}]
    found = conversation({"conversations": [{"role": "human", "content": parts}]})
    assert content(found) == ["video", "What?"]


def test_queries_with_responses_and_history() -> None:
    row = {
        "query": "And <audio>?", "response": 3, "history": [["<video>\nWho?", "Ann"]], "system": "Be brief.",
        "videos": ["v.mp4"], "audios": ["a.wav"], "images": None, "solution": "x",
    }  # fmt: skip
    found = conversation(row)
    assert [(message["role"], message["content"]) for message in found.messages[::2]] == [
        ("system", "Be brief."), ("assistant", "Ann"), ("assistant", "3"),
    ]  # fmt: skip
    assert (content(found, 1), content(found, 3)) == (["video", "Who?"], ["And ", "audio", "?"])
    assert found.meta == {"solution": "x"}
    found = conversation({"query": "Who?", "history": [], "videos": ["v.mp4"]})
    assert (content(found), len(found.messages)) == (["video", "Who?"], 1)
    found = conversation({"instruction": "Say who.", "input": "In one word.", "output": "Ann", "images": ["i.png"]})
    assert content(found) == ["image", "Say who.\nIn one word."]
    assert found.messages[1]["content"] == "Ann"


def test_options_are_asked() -> None:
    row = {"video": "a.mp4", "question": "Which?", "options": ["A. dog", "B. cat"], "answer": "A"}
    asked = "Which?\nA. dog\nB. cat"
    found = conversation(row)
    assert content(found) == ["video", f"{asked}\nAnswer with the option's letter."]
    assert found.messages[1]["content"] == "A"
    assert found.meta == {}
    assert content(conversation(row | {"answer": "Cat"})) == ["video", asked]
    assert content(conversation({k: v for k, v in row.items() if k != "answer"}))[1].endswith("letter.")
    assert content(conversation(row | {"question": asked})) == ["video", asked]
    assert content(conversation(row | {"options": [], "answer": "dog"})) == ["video", "Which?"]


@pytest.mark.parametrize(
    "columns",
    [
        {"choices": ["dog", "it's a cat"]},
        {"candidates": ["(A) dog", "(B) it's a cat"]},
        {"options": {"A": "dog", "B": "it's a cat"}},
        {"choices": {"label": ["A", "B"], "text": ["dog", "it's a cat"]}},
        {"options": '["dog", "it\'s a cat"]'},
        {"options": "['A. dog', \"B. it's a cat\"]"},
        {"options": "['A. dog', 'B. it's a cat']"},
        {"options": "A. dog B. it's a cat"},
        {"options": "dog\nit's a cat\n"},
        {"option_A": "dog", "option_B": "it's a cat", "option_C": None},
        {"A": "dog", "B": "it's a cat", "C": ""},
        {"options": {"a": "dog", "b": "it's a cat"}},
        {"options": ["B. it's a cat", "A. dog"]},
        {"choices": {"label": ["B", "A"], "text": ["it's a cat", "dog"]}},
        {"options": ["a) dog", "b) it's a cat"]},
        {"option2": "it's a cat", "option1": "dog"},
        {"a0": "dog", "a1": "it's a cat"},
    ],
)
def test_options_in_every_writing(columns: dict[str, Any]) -> None:
    found = conversation({"video": "a.mp4", "question": "Which?", "answer": "(b)", **columns})
    assert content(found)[1].splitlines()[:3] == ["Which?", "A. dog", "B. it's a cat"]
    assert found.meta == {}


@pytest.mark.parametrize(
    ("options", "answer", "kept"),
    [
        (["A: dog", "B: cat"], "B: cat", "B: cat"),
        (["A: dog", "B: cat"], "(B) cat", "(B) cat"),
        (["B. cat", "A. dog"], "B", "B"),
        (["B. cat", "A. dog"], "B. cat", "B. cat"),
        (["dog", "cat."], "cat", "cat"),
        (["dog", "cat"], "Cat.", "Cat."),
        (["dog", "C.I.A."], "c.i.a.", "c.i.a."),
        (["dog", "J. Smith"], "J. Smith", "J. Smith"),
        ({"0": "dog", "1": "cat"}, 1, "B"),
        ({"1": "dog", "2": "cat"}, "2", "B"),
        ({"label": ["1", "2"], "text": ["dog", "cat"]}, "2", "B"),
        ([2, 1], 1, "1"),
    ],
)
def test_answers_that_name_the_second_option(options: Any, answer: Any, kept: str) -> None:
    found = conversation({"video": "a.mp4", "question": "Which?", "options": options, "answer": answer})
    assert found.messages[1]["content"] == kept
    assert content(found)[1].splitlines()[2].startswith("B. ")


def answered(value: Any) -> list[dict[str, Any]]:
    """Rows of every form with the same answer."""
    return [
        {"path": "a.mp4", "question": "?", "answer": value},
        {"query": "?", "response": value},
        {"instruction": "?", "output": value},
        {"query": "?", "history": [["?", value]]},
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": value}]},
        {"conversations": [{"role": "user", "content": "?"}, {"role": "assistant", "content": value}]},
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": value}]},
    ]


@pytest.mark.parametrize("several", [False, True])
def test_options_are_asked_in_every_form(several: bool) -> None:
    user = {"role": "user", "content": "<video>Which?"}
    parts = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Which?"}]
    rows: list[dict[str, Any]] = [
        {"query": "Which?", "response": "B"},
        {"instruction": "Which?", "output": "B"},
        {"query": "Which?", "response": "B", "history": [["Who?", "Ann"]]},
        {"conversations": turns("<video>Which?", "B")},
        {"messages": [user, {"role": "assistant", "content": "B"}]},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "B"}], "videos": None},
    ]
    for number, row in enumerate(rows):
        row = {"videos": ["a.mp4"], "level": 3, "options": ["dog", "cat"], **row}
        found = conversation(row)
        (*_, asked) = found.questions()
        assert asked.meta["question"].endswith("Which?\nA. dog\nB. cat\nAnswer with the option's letter.")
        assert (found.messages[-1]["content"], found.meta) == ("B", {"level": 3})
        numbered = {key: value for key, value in row.items() if key != "options"} | {"option1": "dog", "option2": "cat"}
        text = json.dumps(numbered).replace('"B"', '"2"')
        assert conversation(json.loads(text)).messages[-1]["content"] == "B"
        wrong = json.loads(json.dumps(row).replace('"B"', '"cow"'))
        assert "neither the letter nor the text" in reason(wrong)
        key = next((key for key in ("messages", "conversations") if key in row), None)
        if several and key is not None:
            assert "and 2 questions: which one they belong to is not known" in reason(row | {key: row[key] * 2}), number


def test_options_that_a_question_of_several_names_stay_what_they_are() -> None:
    row = {"conversations": turns("Which?\nA. dog\nB. cat", "B", "Why?", "Fur."), "options": ["dog", "cat"]}
    assert conversation(row).meta == {"options": ["dog", "cat"]}


def reason(row: dict[str, Any]) -> str:
    found = Converter(Path("/d/m.jsonl"), Path("/d/media"), allow_missing=True).convert(Entry("line 7", row))
    assert isinstance(found, Skipped)
    return found.reason


@pytest.mark.parametrize(
    ("value", "text"), [("dog", "dog"), (0, "0"), (1.0, "1.0"), (True, "true"), (False, "false"), (" x ", " x ")]
)
def test_answers_that_are_one_text(value: Any, text: str) -> None:
    for row in answered(value):
        assert [m["content"] for m in conversation(row).messages if m["role"] == "assistant"] == [text]


NAN = float("nan")


@pytest.mark.parametrize("value", [None, "", " ", "nan", "NaN", " [] ", NAN, float("inf"), ["dog"], {"x": 1}, []])
def test_answers_that_are_none(value: Any) -> None:
    for row in answered(value):
        found = Converter(Path("/d/m.jsonl"), Path("/d"), allow_missing=True).convert(Entry("line 7", row))
        assert isinstance(found, Skipped)
        assert "the answer, " in found.reason


def test_null_and_nan_count_as_absent() -> None:
    row = {
        "id": NAN,
        "path": None,
        "video": "a.mp4",
        "question": "?",
        "options": None,
        "level": NAN,
        "spans": {"a": None},
    }
    found = conversation(row)
    assert (found.id, found.meta) == ("line 7", {"spans": {}})
    found = conversation({"messages": [{"role": "user", "content": "<video>?"}], "videos": ["a"], "images": None})
    assert found.meta == {}


def test_a_row_with_files_of_several_kinds() -> None:
    found = conversation({"audio": "a.wav", "videos": ["a.mp4", "b.mp4"], "question": "?"})
    assert content(found) == ["video", "video", "audio", "?"]


def test_messages_keep_all_but_their_paths() -> None:
    part = {"type": "video", "video": "a.mp4", "fps": 1, "max_frames": 8}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "?"}], "family": "f"}]
    row = to_messages({"id": "m", "messages": messages, "extra": [None]}, Columns())
    assert row == {"id": "m", "messages": messages, "extra": [None]}
    found = conversation(row)
    assert found.media[0].fps == 1
    assert found.messages[0]["family"] == "f"
    assert found.meta == {"extra": [None]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": turns("<video>?"), "id": "a"}, "fewer files than <video> tags"),
        ({"conversations": turns("<video>?"), "videos": ["a", "b"]}, "more files than <video> tags"),
        ({"conversations": [{"from": "tool", "value": ""}]}, r"conversations\[0\].from is 'tool'; one of human"),
        ({"conversations": [{"from": "human", "value": 3}]}, r"conversations\[0\].value: a string"),
        ({"conversations": "hello"}, "no list of turns"),
        ({"conversations": turns("?"), "video": "a", "videos": ["b"]}, "both 'video' and 'videos'"),
        ({"conversations": turns("?"), "video": 3}, "a media file is 3"),
        ({"conversations": turns("?"), "video": "https://x.org/a.mp4"}, "an address; download"),
        ({"conversations": turns("?"), "video": "none.mp4"}, r"^/d/none\.mp4: there is no such file"),
        ({"movie": "a.mp4", "question": "?"}, "no path: the columns are 'movie', 'question'; name one with --columns"),
        ({"path": "a.mp4", "prompt": "?"}, "no question in column 'question'"),
        ({"path": "a.mp4", "question": "?", "answer": ""}, "the answer, column 'answer', is empty"),
        (
            {"path": "a", "question": "?", "options": ["x", "y"], "answer": "C"},
            "'C' is neither the letter nor the text",
        ),
        ({"path": "a", "question": "?", "options": ["x", "y"], "answer": 1}, "'1' is neither the letter nor the text"),
        ({"path": "a", "question": "?", "options": ["B", "A"], "answer": "A"}, "letter of one option and the text of"),
        ({"path": "a", "question": "?", "options": ["x"]}, "the number of options is 1; from 2 to 26"),
        (
            {"path": "a", "question": "?", "options": ["x", "y"], "answer": 0},
            "whether it counts from 0 or from 1 is not known: write the letter or the text",
        ),
        ({"path": "a", "question": "?", "options": ["A. x", "y"]}, "some options have a letter, others have none"),
        ({"path": "a", "question": "?", "options": ["J. S", "B. J"], "answer": "B"}, "the options have other letters"),
        (
            {"path": "a", "question": "?", "option1": "2", "option2": "1", "answer": 1},
            "name of one option and the text",
        ),
        ({"path": "a", "question": "?", "options": {"label": "AB", "text": "xy"}}, "a list of labels"),
        ({"path": "a", "question": "?", "options": ["x", None]}, "option 2 is None"),
        (
            {"path": "a", "question": "?", "options": {"A": "x", "C": "y"}},
            "letters from A on are needed, without a gap",
        ),
        ({"path": "a", "question": "?", "options": "x"}, "column 'options', are 'x'; a list is needed"),
        ({"query": "?", "history": ["x"]}, "'history' is no list of pairs"),
        ({"query": 3}, "a question is 3"),
        ({"messages": [{"role": "human", "content": "?"}]}, r"messages\[0\].role"),
        ({}, "no path"),
    ],
)
def test_what_cannot_be_used_says_why(row: dict[str, Any], message: str) -> None:
    found = Converter(Path("/d/m.jsonl"), Path("/d")).convert(Entry("line 7", row))
    assert isinstance(found, Skipped)
    assert (found.where, found.id) == ("line 7", row.get("id"))
    with pytest.raises(ValueError, match=message):
        raise ValueError(found.reason)


def test_paths_lead_from_the_manifest_to_the_file_through_links(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.mp4").touch()
    out = tmp_path / "link" / "m.jsonl"
    line = Converter(out, tmp_path / "media").convert(Entry("line 1", {"path": "a.mp4", "question": "?"}))
    assert isinstance(line, str)
    (part,) = parse_line(line, out, 1).media
    assert "/../" in str(part.path)
    assert part.path.is_file()


TEXTS = st.text(st.characters(categories=["L", "Zs"]), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip()) and text.strip() not in ("nan", "NaN")
)
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<\n\r\0"), max_size=12)


@given(st.lists(st.tuples(WORDS, TEXTS), min_size=1, max_size=3), st.dictionaries(WORDS, WORDS, max_size=3))
def test_every_text_and_key_survives(texts: list[tuple[str, str]], extra: dict[str, str]) -> None:
    taken = {"id", "conversations", "messages", "system", "video", "audio", "image", "videos", "audios", "images"}
    extra = {key: value for key, value in extra.items() if key not in taken}
    found = conversation({"conversations": turns(*(text for pair in texts for text in pair)), **extra})
    assert [m["content"] for m in found.messages] == [text for pair in texts for text in pair]
    assert found.meta == extra


def entries(path: Path, source: str | None = None, **options: Any) -> list[Entry]:
    return list(read_entries(str(path), source or source_of(str(path)), **options))


def test_json_lines_and_lists(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"path": "a"}\n\n{"path": \n[1]\n{"path": "b"}', "utf-8")
    found = entries(tmp_path / "a.jsonl")
    assert [(entry.where, entry.row.get("path")) for entry in found] == [
        ("line 1", "a"), ("line 3", None), ("line 4", None), ("line 5", "b"),
    ]  # fmt: skip
    assert "no valid JSON" in str(found[1].error)
    assert "this is a list" in str(found[2].error)
    (tmp_path / "a.json").write_text(' [{"path": "a"}, 3]')
    found = entries(tmp_path / "a.json")
    assert [entry.where for entry in found] == ["entry 1", "entry 2"]
    assert str(found[1].error).endswith("this is a number")
    (tmp_path / "b.json").write_text('[{"path": "a"},\n 3')
    with pytest.raises(FormatError, match=r"b\.json: no valid JSON .*line 2"):
        entries(tmp_path / "b.json")


def test_rows_that_no_reader_takes_are_errors_of_their_own(tmp_path: Path) -> None:
    rows = [f'{{"n": {"1" * 5000}}}', '{"n": [1]}', f'{{"n": {"[" * 700}{"]" * 700}}}', "1" * 5000]
    (tmp_path / "a.json").write_text(f"[{', '.join(rows)}]")
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, '{"n": ' + "[" * 100_000]))
    for name, where in (("a.json", "entry"), ("a.jsonl", "line")):
        found = entries(tmp_path / name)
        assert found[0].error == "it holds an integer of 5000 digits; quote it"
        assert (found[1].where, found[1].error) == (f"{where} 2", None)
        assert str(found[3].error).endswith("this is a number")
    assert "no valid JSON" in str(found[4].error)
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(FormatError, match="no valid JSON"):
        entries(tmp_path / "a.json")


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("key", ["question", "answer", "id", "path", "level"])
@pytest.mark.parametrize("value", ["\ud83d", nested(5000)])
def test_what_cannot_be_written_is_an_error_of_its_row(key: str, value: Any) -> None:
    row = {"path": "a.mp4", "question": "?", "answer": "x", key: value}
    found = Converter(Path("/d/m.jsonl"), Path("/d"), allow_missing=True).convert(Entry("line 7", row))
    assert isinstance(found, Skipped)
    assert "half a character" in found.reason if isinstance(value, str) else "nested too deeply" in found.reason


def test_tables_with_line_breaks_in_cells(tmp_path: Path) -> None:
    text = 'path,question,answer\r\na.mp4,"two\r\nlines, and a comma","it ""is"""\r\nb.mp4,one\r\nc.mp4,q,\xe4\r\n'
    (tmp_path / "a.csv").write_bytes(text.encode("utf-8-sig"))
    found = entries(tmp_path / "a.csv")
    assert [entry.where for entry in found] == ["line 2", "line 4", "line 5"]
    assert found[0].row == {"path": "a.mp4", "question": "two\r\nlines, and a comma", "answer": 'it "is"'}
    assert found[1].error == "2 cells, but the header has 3 columns"
    assert found[2].row["answer"] == "ä"
    (tmp_path / "a.tsv").write_text("path\tquestion\na.mp4\tb, c\n")
    assert entries(tmp_path / "a.tsv")[0].row == {"path": "a.mp4", "question": "b, c"}
    (tmp_path / "a.csv").write_text("path;question;answer\na.mp4;b, c;d\n")
    assert entries(tmp_path / "a.csv")[0].row == {"path": "a.mp4", "question": "b, c", "answer": "d"}
    (tmp_path / "a.csv").write_text('path\t"question, or so"\na.mp4\tb; c\n')
    assert entries(tmp_path / "a.csv")[0].row == {"path": "a.mp4", "question, or so": "b; c"}
    (tmp_path / "a.csv").write_text(f"path\n{'a' * 200_000}\n")
    assert len(entries(tmp_path / "a.csv")[0].row["path"]) == 200_000
    (tmp_path / "b.csv").write_bytes("path\n\xe4".encode("latin-1"))
    with pytest.raises(FormatError, match=r"b\.csv: cannot be read: 'utf-8'"):
        entries(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("path,path\n")
    with pytest.raises(FormatError, match="name each column once"):
        entries(tmp_path / "c.csv")


@pytest.mark.parametrize("stray", ['"q"r', '"q" he said', '"open'])
def test_a_stray_quotation_mark_is_the_error_of_its_line(tmp_path: Path, stray: str) -> None:
    rows = [f"a.mp4,{stray},x", 'b.mp4,"two', 'lines",y', f"c.mp4,{stray},x", "d.mp4,q,z", ""]
    (tmp_path / "a.csv").write_text("\n".join(["path,question,answer", *rows]))
    found = {entry.where: entry for entry in entries(tmp_path / "a.csv")}
    assert "quotation mark" in str(found["line 2"].error)
    assert "quotation mark" in str(found["line 5"].error)
    assert found["line 3"].row["question"] == "two\nlines"
    assert found["line 6"].row == {"path": "d.mp4", "question": "q", "answer": "z"}
    assert len(found) == 4
    (tmp_path / "a.tsv").write_text("path\tquestion\tanswer\n" + "\n".join(rows).replace(",", "\t"))
    found = {entry.where: entry for entry in entries(tmp_path / "a.tsv")}
    assert [entry.error for entry in found.values()] == [None] * 4
    assert found["line 2"].row["question"] == found["line 5"].row["question"] == stray
    assert found["line 3"].row["question"] == "two\nlines"


def test_a_folder_gives_its_media_files_in_order(tmp_path: Path) -> None:
    for name in ("b.MP4", "a/c.webm", "a/sound.wav", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [entry.row["path"] for entry in entries(tmp_path)] == ["a/c.webm", "a/sound.wav", "b.MP4"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="there is no media file"):
        entries(tmp_path / "empty")


def test_hugging_face_folders_without_decoding(tmp_path: Path) -> None:
    import datasets

    rows = [{"id": "a", "conversations": turns("?", "!"), "video": "v.mp4", "n": None},
            {"id": "b", "conversations": turns("?"), "video": "w.mp4", "n": 3}]  # fmt: skip
    split = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": split, "test": split.select([0])}).save_to_disk(tmp_path / "saved")
    assert source_of(str(tmp_path / "saved")) == "hf"
    found = entries(tmp_path / "saved", split="train")
    assert [entry.where for entry in found] == ["row 1", "row 2"]
    assert conversation(dict(found[0].row)).meta == {}
    assert conversation(dict(found[1].row)).meta == {"n": 3}
    assert len(entries(tmp_path / "saved", split="test")) == 1
    with pytest.raises(FormatError, match="has the splits train, test; choose one with --split"):
        entries(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    split.to_parquet(tmp_path / "files" / "train.parquet")
    assert [entry.row["id"] for entry in entries(tmp_path / "files")] == ["a", "b"]


def test_dates_become_text_and_what_json_cannot_hold_is_left_out(tmp_path: Path) -> None:
    import datasets

    day = datetime.datetime(2024, 5, 6, 7, 8)
    row = {"path": "a.mp4", "question": "?", "answer": day.date(), "at": [{"day": day}], "raw": b"x", "id": "a"}
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "saved")
    converter = Converter(tmp_path / "m.jsonl", tmp_path, allow_missing=True)
    (line,) = map(converter.convert, entries(tmp_path / "saved"))
    found = parse_line(str(line), tmp_path / "m.jsonl", 1)
    assert found.messages[1]["content"] == "2024-05-06"
    assert found.meta == {"at": [{"day": "2024-05-06T07:08:00"}]}
    assert converter.dropped == {"raw"}


def test_media_inside_a_data_set_are_written_beside_the_manifest(tmp_path: Path) -> None:
    row = {"path": {"path": "x/a.mp4", "bytes": b"film"}, "question": "?"}
    converter = Converter(tmp_path / "m.jsonl", tmp_path)
    lines = [converter.convert(Entry(f"row {number}", row)) for number in (1, 2)]
    paths = {parse_line(str(line), tmp_path / "m.jsonl", 1).media[0].path for line in lines}
    (path,) = paths
    assert path.read_bytes() == b"film"
    assert path.parent == tmp_path / "m_media"
    assert path.suffix == ".mp4"


def test_a_path_that_says_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(FormatError, match=r"suffix '\.txt' says nothing; add --format json\|csv"):
        source_of(str(tmp_path / "a.txt"))
    with pytest.raises(FormatError, match="for a name on the hub, add --format hf"):
        source_of("owner/name")
