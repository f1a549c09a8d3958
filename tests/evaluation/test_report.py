"""The report says what was measured, in the schema that other tools read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omnisieve.evaluation.metrics import Answer
from omnisieve.evaluation.report import (
    Cell,
    EvaluationError,
    Kind,
    check_answered,
    make_report,
    markdown,
    write_report,
)

ROW_KEYS = {
    "method", "benchmark", "retained_ratio", "status", "measured_ratio", "accuracy", "ci95", "n_questions", "n_clips",
    "n_failures", "by_family",
}  # fmt: skip


def cell(method: str, kind: Kind, ratio: float, right: int, n: int = 8, **values) -> Cell:
    """A row over `n` clips with one question each, of which the first `right` are answered rightly."""
    kept = (round(12 * ratio), round(8 * ratio))
    given = [Answer(f"q{i}", f"c{i}", "f", "yes", "yes", i < right, kept, (12, 8)) for i in range(n)]
    return Cell(method, kind, "world", ratio, given, **values)


def cells() -> list[Cell]:
    """Every kind of row."""
    return [
        cell("full", "full", 1.0, 8, failures=2),
        cell("random", "training-free", 0.25, 2, failures=2),
        cell("stvp", "training-free", 0.25, 4, failures=2),
        cell("oracle", "bound", 0.25, 8, failures=2),
        cell("out/export", "learned", 0.25, 6, failures=2),
        Cell("dycoke", "training-free", "world", 0.1, unreachable="at least 25 % of the video stays"),
    ]


def test_rows_follow_the_schema() -> None:
    report = json.loads(json.dumps(make_report(cells(), {"torch": "x"})))
    assert {"rows", "environment"} <= report.keys()
    assert all(row.keys() == ROW_KEYS for row in report["rows"])
    row = report["rows"][2]
    assert (row["method"], row["status"], row["accuracy"], row["n_questions"], row["n_clips"]) == (
        "stvp",
        "ok",
        50.0,
        8,
        8,
    )
    assert row["ci95"][0] < 50 < row["ci95"][1]
    assert row["measured_ratio"] == {"video": 0.25, "audio": 0.25, "total": 0.25}
    assert row["by_family"] == {"f": 50.0}


def test_failures_lower_no_accuracy() -> None:
    row = make_report(cells(), {})["rows"][0]
    assert (row["n_failures"], row["n_questions"], row["accuracy"]) == (2, 8, 100.0)


def test_unreachable_rows_have_no_accuracy_and_a_reason() -> None:
    report = make_report(cells(), {})
    row = report["rows"][-1]
    assert (row["status"], row["accuracy"], row["ci95"], row["n_questions"]) == ("unreachable", None, None, 0)
    assert report["unreachable"][0]["reason"] == "at least 25 % of the video stays"


def test_rows_without_an_answer_are_not_ok() -> None:
    failed = [*cells(), Cell("late", "training-free", "world", 0.25, failures=8)]
    report = make_report(failed, {}, failures=[{"clip": "c0", "error": "c0.mp4: video: cut"}])
    row = report["rows"][-1]
    assert (row["status"], row["accuracy"], row["n_failures"]) == ("unreachable", None, 8)
    assert "c0.mp4" in report["unreachable"][-1]["reason"]
    assert "| late | 25% | unreachable |" in markdown(report)
    with pytest.raises(EvaluationError, match=r"late at 25% has no result: none .* first: c0\.mp4: video: cut"):
        check_answered(report, failed)
    check_answered(make_report(cells(), {}), cells())


def test_learned_rows_are_compared_with_the_best_training_free_row() -> None:
    (comparison,) = make_report(cells(), {})["comparisons"]
    assert (comparison["method"], comparison["against"]) == ("out/export", "stvp")
    assert comparison["difference"] == 25.0
    assert comparison["ci95"][0] <= 25 <= comparison["ci95"][1]


def test_markdown_shows_every_row() -> None:
    text = markdown(make_report(cells(), {}))
    assert "| stvp | 25% | 50.0 (" in text
    assert "| dycoke | 10% | unreachable | - |" in text
    assert "| out/export | stvp | world | 25% | +25.0 (" in text


def test_written_files(tmp_path: Path) -> None:
    report = make_report(cells(), {})
    write_report(report, cells(), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (tmp_path / "out" / "report.md").read_text() == markdown(report)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert lines[0]["method"] == "full"
    assert lines[0]["question"] == "q0"
