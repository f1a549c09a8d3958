"""The report of an evaluation: one row per method, benchmark and ratio, as JSON and as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from omnisieve.backbones.shape import DecoderShape
from omnisieve.evaluation.efficiency import Prefill, summarise
from omnisieve.evaluation.metrics import (
    BOOTSTRAP_SAMPLES,
    Answer,
    Interval,
    accuracy,
    accuracy_by_family,
    paired_difference,
    retained,
)
from omnisieve.files import write_text

# With fewer clips the bootstrap draws from too few different samples for its interval to be one.
FEW_CLIPS = 10
# Failures that the table names; report.json has all.
_NAMED = 3

Kind = Literal["full", "training-free", "learned", "bound"]
"""What a method is: all tokens, a method of the field, a trained one, or a bound that knows the answer."""


CONFIG, REPORT, SUMMARY, PREDICTIONS = "eval.yaml", "report.json", "report.md", "predictions.jsonl"
"""Files in the folder of an evaluation."""


class EvaluationError(ValueError):
    """An evaluation has no result; the message says which and why."""


@dataclass
class Cell:
    """Everything that one row is made from.

    Attributes:
        method, kind: label of the method in the report, and what it is.
        benchmark: its name.
        retained_ratio: the ratio that was asked for.
        answers: of the questions that could be asked.
        prefills: what their prompts put through the LLM.
        failures: questions that could not be asked, because their clip could not be read.
        unreachable: why the method cannot have this ratio, None if it can.
        preset: name of the preset that the ratio comes from.
        llm: export whose adapters the LLM had; None: the LLM as it was loaded.
    """

    method: str
    kind: Kind
    benchmark: str
    retained_ratio: float
    answers: list[Answer] = field(default_factory=list)
    failures: int = 0
    unreachable: str | None = None
    prefills: list[Prefill] = field(default_factory=list)
    preset: str | None = None
    llm: str | None = None

    @property
    def ok(self) -> bool:
        return self.unreachable is None and bool(self.answers)

    @property
    def unanswered(self) -> bool:
        """Whether the method can have the ratio, but no question was asked."""
        return self.unreachable is None and not self.answers


def make_report(
    cells: Sequence[Cell],
    environment: Mapping[str, Any],
    *,
    methods: Mapping[str, Any] | None = None,
    failures: Sequence[Mapping[str, str]] = (),
    decoder: DecoderShape | None = None,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """The content of `report.json`.

    Args:
        cells: one per row.
        environment: what was evaluated on which machine with which libraries.
        methods: label -> settings, so that every knob is on record.
        failures: `{"clip", "error"}` of each clip that could not be read.
        decoder: without it no row says what its prompts cost.
        samples, seed: of the bootstrap.
    """
    return {
        "rows": [_row(cell, samples, seed) | {"efficiency": _efficiency(cell, decoder)} for cell in cells],
        "comparisons": [_comparison(*pair, samples, seed) for pair in _rivals(cells)],
        "methods": dict(methods or {}),
        "unreachable": [
            {
                "method": c.method,
                "benchmark": c.benchmark,
                "retained_ratio": c.retained_ratio,
                "reason": c.unreachable or _nothing_asked(failures),
            }
            for c in cells
            if not c.ok
        ],
        "failures": list(failures),
        "environment": dict(environment),
    }


def check_answered(report: Mapping[str, Any], cells: Sequence[Cell]) -> None:
    """Refuse a report in which a method was asked nothing.

    Raises:
        EvaluationError: names the first such method, and the first clip that could not be read.
    """
    empty = next((cell for cell in cells if cell.unanswered), None)
    if empty is not None:
        raise EvaluationError(
            f"{empty.benchmark}: {empty.method} at {empty.retained_ratio:.0%} has no result: "
            f"{_nothing_asked(report['failures'])}"
        )


def check_folder(directory: str | Path) -> None:
    """Refuse a folder whose files of these names no evaluation wrote, before hours of work.

    Raises:
        EvaluationError: names the first.
    """
    folder = Path(directory)
    found = [name for name in (REPORT, SUMMARY, PREDICTIONS) if (folder / name).exists()]
    if found and not (folder / CONFIG).is_file():
        raise EvaluationError(
            f"{folder / found[0]} is there, and no evaluation wrote it ({folder} has no {CONFIG}): choose another "
            "output_dir"
        )


def write_report(report: Mapping[str, Any], cells: Sequence[Cell], directory: str | Path) -> None:
    """Write `report.json`, `report.md` and `predictions.jsonl` (one line per row and question)."""
    folder = Path(directory)
    lines = (
        {"method": cell.method, "benchmark": cell.benchmark, "retained_ratio": cell.retained_ratio} | asdict(answer)
        for cell in cells
        for answer in cell.answers
    )
    write_text(folder / PREDICTIONS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_text(folder / SUMMARY, markdown(report))
    write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: a table per benchmark, then what the learned methods gain."""
    parts = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["benchmark"] == benchmark]
        parts += [_results_table(benchmark, rows), *_footnotes(rows)]
    if report["comparisons"]:
        parts.append(_comparison_table(report["comparisons"]))
    for entry in report["unreachable"]:
        parts.append(f"{entry['method']} at {entry['retained_ratio']:.0%} is unreachable: {entry['reason']}")
    if report["failures"]:
        first = "".join(f"\n- {failure['error']}" for failure in report["failures"][:_NAMED])
        parts.append(
            f"{len(report['failures'])} clips could not be read; report.json names all, the first are:\n{first}"
        )
    return "\n\n".join(parts) + "\n"


def markdown_by_ratio(report: Mapping[str, Any]) -> str:
    """Accuracies alone, a table per benchmark: a row for each method, a column for each ratio; "-" is unreachable."""
    parts = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in report["rows"]):
        found: dict[str, dict[float, Mapping[str, Any]]] = {}
        for row in report["rows"]:
            if row["benchmark"] == benchmark:
                found.setdefault(row["method"], {})[row["retained_ratio"]] = row
        ratios = sorted({ratio for by_ratio in found.values() for ratio in by_ratio}, reverse=True)
        lines = [
            "| method | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |",
            "|---|" + "---|" * len(ratios),
        ]
        for method, by_ratio in found.items():
            lines.append(f"| {method} | " + " | ".join(_score(by_ratio.get(ratio)) for ratio in ratios) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _score(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return "-" if row["accuracy"] is None else f"{row['accuracy']:.1f}"


def _nothing_asked(failures: Sequence[Mapping[str, str]]) -> str:
    first = f"; first: {failures[0]['error']}" if failures else ""
    return f"none of its questions could be asked (clips that cannot be read: {len(failures)}{first})"


def _row(cell: Cell, samples: int, seed: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": cell.method,
        "benchmark": cell.benchmark,
        "retained_ratio": cell.retained_ratio,
        "preset": cell.preset,
        "llm": cell.llm,
        "status": "ok" if cell.ok else "unreachable",
        "measured_ratio": dict.fromkeys(("video", "audio", "total")),
        "accuracy": None,
        "ci95": None,
        "n_questions": 0,
        "n_clips": 0,
        "n_failures": cell.failures,
        "by_family": {},
    }
    if not cell.ok:
        return row
    right = accuracy(cell.answers, samples=samples, seed=seed)
    return row | {
        "measured_ratio": retained(cell.answers),
        "accuracy": right.value,
        "ci95": [right.low, right.high],
        "n_questions": len(cell.answers),
        "n_clips": len({a.clip for a in cell.answers}),
        "by_family": accuracy_by_family(cell.answers),
    }


def _efficiency(cell: Cell, decoder: DecoderShape | None) -> dict[str, Any] | None:
    return summarise(cell.prefills, decoder) if decoder is not None and cell.prefills else None


def _rivals(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """Each learned row with the best training-free row of the same LLM, benchmark and ratio."""

    def place(cell: Cell) -> tuple[str, float, str | None, str | None]:
        # On other clips than its source's a preset keeps another share than it says: it is a place of its own.
        return cell.benchmark, cell.retained_ratio, cell.preset, cell.llm

    pairs = []
    for cell in cells:
        rivals = [c for c in cells if c.kind == "training-free" and c.ok and place(c) == place(cell)]
        if cell.kind == "learned" and cell.ok and rivals:
            pairs.append((cell, max(rivals, key=lambda c: sum(a.correct for a in c.answers) / len(c.answers))))
    return pairs


def _comparison(cell: Cell, rival: Cell, samples: int, seed: int) -> dict[str, Any]:
    gain: Interval = paired_difference(cell.answers, rival.answers, samples=samples, seed=seed)
    return {
        "method": cell.method,
        "against": rival.method,
        "benchmark": cell.benchmark,
        "retained_ratio": cell.retained_ratio,
        "difference": gain.value,
        "ci95": [gain.low, gain.high],
    }


def _results_table(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> str:
    wholes = [row for row in rows if row["retained_ratio"] == 1 and row["accuracy"]]
    # First those of the LLM as it was loaded.
    full = next((row["accuracy"] for row in sorted(wholes, key=lambda row: row.get("llm") is not None)), None)
    # Reports of older versions hold no costs.
    costs = any(row.get("efficiency") for row in rows)
    lines = [
        f"### {benchmark}",
        "",
        f"| method | asked | accuracy (95 %) | of full | video | audio | total |{' FLOPs of full |' if costs else ''}"
        " questions / clips | failures |",
        f"|---|---|---|---|---|---|---|---|---|{'---|' if costs else ''}",
    ]
    for row in rows:
        shares = [row["measured_ratio"][name] for name in ("video", "audio", "total")]
        shares += [(row.get("efficiency") or {}).get("of_full", {}).get("exact")] if costs else []
        ratios = " | ".join(map(_percent, shares))
        score, share = row["status"] if row["status"] != "ok" else "-", "-"
        if row["accuracy"] is not None:
            score = "{:.1f} ({:.1f} to {:.1f})".format(row["accuracy"], *row["ci95"])
            share = _percent(row["accuracy"] / full if full else None)
        lines.append(
            f"| {row['method']} | {row['retained_ratio']:.0%}{'*' * _is_off(row)} | {score} | {share} | {ratios} "
            f"| {row['n_questions']} / {row['n_clips']} | {row['n_failures']} |"
        )
    return "\n".join(lines)


def _footnotes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of a table of results must know."""
    notes = []
    if any(map(_is_off, rows)):
        notes.append(
            "Asked with *: as the preset's source states it; on these clips its settings keep the share under total."
        )
    for llm in dict.fromkeys(row["llm"] for row in rows if row.get("llm")):
        methods = dict.fromkeys(row["method"] for row in rows if row.get("llm") == llm)
        notes.append(
            f"Answered by the LLM with the adapters of {llm}, not by the one that was loaded: {', '.join(methods)}. "
            "Learned methods are compared with others on the same LLM."
        )
    clips = min((row["n_clips"] for row in rows if row["n_clips"]), default=FEW_CLIPS)
    if clips < FEW_CLIPS:
        notes.append(
            f"Intervals over {clips} clips are not reliable, however narrow: take {FEW_CLIPS} at least, better 100."
        )
    return notes


def _is_off(row: Mapping[str, Any]) -> bool:
    """Whether a preset keeps another share than it states. Reports of older versions do not say what was one."""
    total = row["measured_ratio"]["total"]
    return row.get("preset") is not None and total is not None and abs(total - row["retained_ratio"]) > 0.005


def _comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "Learned against the best training-free method at the same ratio, points, paired by question:",
        "",
        "| learned | against | benchmark | asked | difference (95 %) |",
        "|---|---|---|---|---|",
    ]
    lines += [
        "| {method} | {against} | {benchmark} | {retained_ratio:.0%} | ".format(**c)
        + "{:+.1f} ({:+.1f} to {:+.1f}) |".format(c["difference"], *c["ci95"])
        for c in comparisons
    ]
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
