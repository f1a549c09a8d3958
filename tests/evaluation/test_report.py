"""The report says what was measured, in the schema that other tools read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from omnisieve.backbones.shape import DecoderShape
from omnisieve.evaluation.efficiency import Prefill
from omnisieve.evaluation.metrics import Answer
from omnisieve.evaluation.report import (
    Cell,
    EvaluationError,
    Kind,
    check_answered,
    check_folder,
    make_report,
    markdown,
    markdown_by_ratio,
    write_report,
)

ROW_KEYS = {
    "method", "benchmark", "retained_ratio", "preset", "status", "measured_ratio", "accuracy", "ci95", "n_questions",
    "n_clips", "n_failures", "by_family", "efficiency", "llm",
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


def test_methods_are_compared_on_one_llm_and_shares_are_of_the_loaded_one() -> None:
    rows = [
        cell("full on tuned", "full", 1.0, 4, llm="out/tuned"),
        *cells(),
        cell("stvp on tuned", "training-free", 0.25, 3, llm="out/tuned"),
        cell("out/tuned", "learned", 0.25, 6, llm="out/tuned"),
    ]
    report = make_report(rows, {})
    assert [row["llm"] for row in report["rows"]].count("out/tuned") == 3
    assert [(c["method"], c["against"]) for c in report["comparisons"]] == [
        ("out/export", "stvp"),
        ("out/tuned", "stvp on tuned"),
    ]
    text = markdown(report)
    assert "adapters of out/tuned, not by the one that was loaded: full on tuned, stvp on tuned, out/tuned." in text
    (line,) = (line for line in text.splitlines() if line.startswith("| full on tuned"))
    assert "| 50.0 % |" in line
    assert "Answered by" not in markdown(make_report(cells(), {}))


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


def test_rows_at_a_preset_are_compared_with_each_other_only() -> None:
    better = cell("dycoke@p", "training-free", 0.25, 7, preset="p")
    (comparison,) = make_report([*cells(), better], {})["comparisons"]
    assert comparison["against"] == "stvp"
    learned = cell("out/export@p", "learned", 0.25, 8, preset="p")
    found = {c["method"]: c["against"] for c in make_report([*cells(), better, learned], {})["comparisons"]}
    assert found == {"out/export": "stvp", "out/export@p": "dycoke@p"}


def test_markdown_shows_every_row() -> None:
    text = markdown(make_report(cells(), {}))
    assert "| stvp | 25% | 50.0 (" in text
    assert "| dycoke | 10% | unreachable | - |" in text
    assert "| out/export | stvp | world | 25% | +25.0 (" in text


DECODER = DecoderShape(2, 8, 2, 1, 4, 16, 10)


def with_prefills() -> list[Cell]:
    """The rows of `cells`, whose questions each have 20 media tokens and 4 of text."""
    found = cells()
    for one in found:
        kept = np.full((len(one.answers), 2), round(20 * one.retained_ratio))
        if one.answers:
            one.prefills.append(Prefill(np.full(len(kept), 4), np.full(len(kept), 20), kept, kept))
    return found


def test_too_few_clips_are_told() -> None:
    told = "Intervals over 9 clips are not reliable"
    assert told in markdown(make_report([cell("full", "full", 1.0, 8, n=9)], {}))
    assert "not reliable" not in markdown(make_report([cell("full", "full", 1.0, 8, n=10)], {}))
    assert "not reliable" not in markdown(make_report([cells()[-1]], {}))


def test_presets_that_keep_another_share_are_told() -> None:
    rows = [cell("a", "training-free", 0.25, 2, preset="p"), cell("b", "training-free", 0.25, 2)]
    assert "*" not in markdown(make_report(rows, {}))
    rows[0].retained_ratio = rows[1].retained_ratio = 0.35
    text = markdown(make_report(rows, {}))
    assert "| a | 35%* |" in text
    assert "| b | 35% |" in text
    assert "Asked with *: as the preset's source states it" in text


def test_the_first_failures_are_named_with_their_cure() -> None:
    failures = [{"clip": f"{i}.mp4", "error": f"{i}.mp4: broken. Cure: copy it."} for i in range(5)]
    text = markdown(make_report(cells(), {}, failures=failures))
    assert text.endswith("the first are:\n\n" + "".join(f"- {i}.mp4: broken. Cure: copy it.\n" for i in range(3)))
    assert text.splitlines()[-5].startswith("5 clips could not be read")


def test_rows_say_what_their_prompts_cost() -> None:
    rows = make_report(with_prefills(), {}, decoder=DECODER)["rows"]
    full, random = (row["efficiency"] for row in rows[:2])
    assert set(full["of_full"].values()) == {1}
    assert random["media_tokens_per_layer"] == [5, 5]
    assert random["layer_retention"] == 0.25
    assert random["tflops"]["exact"] == pytest.approx(random["of_full"]["exact"] * full["tflops"]["exact"])
    assert rows[-1]["efficiency"] is None
    assert all(row["efficiency"] is None for row in make_report(with_prefills(), {})["rows"])


def test_markdown_has_a_column_of_costs_where_they_are_known() -> None:
    report = make_report(with_prefills(), {}, decoder=DECODER)
    share = f"{100 * report['rows'][1]['efficiency']['of_full']['exact']:.1f} %"
    table = markdown(report).split("\n\n")[1].splitlines()
    assert "| total | FLOPs of full | questions / clips |" in table[0]
    assert {line.count("|") for line in table} == {11}
    assert f"| 25.0 % | {share} | 8 / 8 |" in next(line for line in table if line.startswith("| random"))
    assert "| - | 0 / 0 |" in next(line for line in table if line.startswith("| dycoke"))


def test_reports_without_costs_have_no_such_column() -> None:
    report = make_report(cells(), {})
    older = report | {"rows": [{k: v for k, v in row.items() if k != "efficiency"} for row in report["rows"]]}
    assert markdown(older) == markdown(report)
    assert "FLOPs" not in markdown(older)


def test_written_files(tmp_path: Path) -> None:
    report = make_report(cells(), {})
    write_report(report, cells(), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (tmp_path / "out" / "report.md").read_text() == markdown(report)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert lines[0]["method"] == "full"
    assert lines[0]["question"] == "q0"


def test_ratios_may_be_columns() -> None:
    rows = [*cells(), cell("random", "training-free", 0.1, 1)]
    assert markdown_by_ratio(make_report(rows, {})).splitlines() == [
        "| method | 100% | 25% | 10% |",
        "|---|---|---|---|",
        "| full | 100.0 |  |  |",
        "| random |  | 25.0 | 12.5 |",
        "| stvp |  | 50.0 |  |",
        "| oracle |  | 100.0 |  |",
        "| out/export |  | 75.0 |  |",
        "| dycoke |  |  | - |",
    ]


def test_a_folder_of_others_is_refused_before_the_work(tmp_path: Path) -> None:
    check_folder(tmp_path / "new")
    (tmp_path / "notes").write_text("mine")
    check_folder(tmp_path)
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(EvaluationError, match=r"report\.md is there, and no evaluation wrote it"):
        check_folder(tmp_path)
    (tmp_path / "eval.yaml").write_text("")
    check_folder(tmp_path)
