"""No number in a document that its result file does not hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools import update_tables


def test_documents_are_up_to_date() -> None:
    assert update_tables.main(["--check"]) == 0


@pytest.mark.parametrize("form", ["", " by ratio"])
def test_a_changed_number_is_noticed_and_mended(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text(f"a\n<!-- table: r.json{form} -->\n| 99 |\n<!-- end of table -->\nb\n")
    (tmp_path / "r.json").write_text('{"rows": [], "comparisons": [], "unreachable": [], "failures": []}')
    monkeypatch.setattr(update_tables, "ROOT", tmp_path)
    monkeypatch.setattr(update_tables, "DOCUMENTS", ("README.md",))
    assert update_tables.main(["--check"]) == 1
    assert update_tables.main([]) == 0
    assert "99" not in (tmp_path / "README.md").read_text()
    assert update_tables.main(["--check"]) == 0


def test_figures_of_a_true_shape_and_of_towers_have_tables() -> None:
    assert "| train | " in update_tables.table("results/true_shape_3b.json", by_ratio=False)
    assert update_tables.table("results/bench_towers.json", by_ratio=False).startswith("| width | calls, stock")
