"""Write the tables of documents anew from the results they come from.

    python tools/update_tables.py            # rewrites
    python tools/update_tables.py --check    # exits 1 if a document is out of date

A table stands between `<!-- table: results/FILE.json -->` and `<!-- end of table -->`; FILE is a `report.json`. With
`by ratio` behind the file it has a column for each ratio instead of a row, and accuracies alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

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
    """The Markdown of a report."""
    report = json.loads((ROOT / source).read_text(encoding="utf-8"))
    return markdown_by_ratio(report) if by_ratio else markdown(report)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
