"""Write the tables of documents anew from the results they come from.

    python tools/update_tables.py            # rewrites
    python tools/update_tables.py --check    # exits 1 if a document is out of date

A table stands between `<!-- table: results/FILE.json -->` and `<!-- end of table -->`; FILE is a `report.json`, or what
tools/true_shape.py or tools/bench.py wrote. With `by ratio` behind a report it has a column for each ratio instead of a
row, and accuracies alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from omnisieve.evaluation.report import markdown, markdown_by_ratio

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "docs", "data/testbed")
BLOCK = re.compile(
    r"(<!-- table: (?P<source>\S+)(?P<by_ratio> by ratio)? -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL
)


def main(argv: list[str]) -> int:
    """Rewrite or check every document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if something would change")
    check = parser.parse_args(argv).check
    stale = [path for path in documents() if refreshed(path) != path.read_text(encoding="utf-8")]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is out of date' if check else 'rewritten'}")
        if not check:
            path.write_text(refreshed(path), encoding="utf-8")
    return int(check and bool(stale))


def documents() -> list[Path]:
    """Markdown files that may hold tables."""
    found: list[Path] = []
    for name in DOCUMENTS:
        place = ROOT / name
        found += sorted(place.rglob("*.md")) if place.is_dir() else [place]
    return found


def refreshed(path: Path) -> str:
    """A document's text with every table generated."""
    return BLOCK.sub(
        lambda block: block[1] + table(block["source"], by_ratio=bool(block["by_ratio"])) + block["end"],
        path.read_text(encoding="utf-8"),
    )


def table(source: str, *, by_ratio: bool) -> str:
    """The Markdown of a file of results."""
    report = json.loads((ROOT / source).read_text(encoding="utf-8"))
    if "shape" in report:
        return of_true_shape(report)
    if report.get("benchmark") == "towers":
        return of_towers(report)
    return markdown_by_ratio(report) if by_ratio else markdown(report)


def of_true_shape(report: dict[str, Any]) -> str:
    """What tools/true_shape.py measured."""
    model, memory, tokens, machine = (report[name] for name in ("model", "memory", "tokens", "environment"))
    step, cached = report["first_step_seconds"], report["step_from_cache_seconds"]
    parts = ", ".join(f"{name} {step[name]:.0f}" for name in ("encoders", "forward", "backward"))
    kept = tokens["video kept"] + tokens["audio kept"]
    rows = [
        f"| {name.replace('_', ' ')} | {program['seconds']:.0f} | {program['peak_gib']:.1f} |"
        for name, program in report["programs"].items()
    ]
    lines = [
        f"{model['parameters']:,} random bfloat16 parameters, {model['layers']} layers of width "
        f"{model['hidden_size']}; a clip of {tokens['video']:,} video and {tokens['audio']:,} audio tokens, of which "
        f"{kept:,} stay.",
        f"{machine['cores']} cores, {machine['cpu']}; torch {machine['torch']}, transformers "
        f"{machine['transformers']}.",
        "",
        "| program | seconds | peak of its process, GiB |",
        "|---|---|---|",
        *rows,
        "",
        f"A step takes {step['step']:.0f} s ({parts}), from the feature cache {cached['step']:.0f} s. Its memory",
        f"beside {memory['libraries_gib']:.1f} GiB of libraries: {memory['estimated_gib']:.2f} GiB estimated, "
        f"{memory['measured_gib']:.2f} measured ({memory['estimate_minus_measured_percent']:+.1f} %).",
        "The peaks in the table include libraries and what the C library's heap keeps for later. A checkpoint has",
        f"{report['checkpoint_mb']:.0f} MB, the export {report['export_mb']:.0f} MB.",
        "",
    ]
    return "\n".join(lines)


def of_towers(report: dict[str, Any]) -> str:
    """What `tools/bench.py towers` measured."""
    lines = [
        "| width | calls, stock | calls, batched | seconds, stock | seconds, batched | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["widths"]:
        calls, seconds = row["calls"], row["seconds"]
        cells = [f"{row['hidden']}", f"{calls['stock']:,}", f"{calls['batched']:,}"]
        cells += [f"{seconds['stock']:.2f}", f"{seconds['batched']:.2f}", f"{row['ratio']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
