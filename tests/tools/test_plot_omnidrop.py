"""The drawing of OmniDrop's schedules."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tools import plot_omnidrop


def test_means_stand_beside_the_paper_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "curves.svg"
    assert plot_omnidrop.main(["--out", str(out)]) == 0
    rows = re.findall(r"^(omnidrop/\S+) +(\d+) +(\S+) +(\d+) +(\S+)", capsys.readouterr().out, re.MULTILINE)
    assert [(name.removeprefix("omnidrop/"), mean, paper, difference) for name, _, mean, paper, difference in rows] == [
        ("7b/30", "28.8", "30", "-1.2"),
        ("7b/20", "20.6", "20", "+0.6"),
        ("3b/30", "29.1", "30", "-0.9"),
        ("3b/20", "20.6", "20", "+0.6"),
    ]
    curves = ElementTree.parse(out).getroot().findall(".//{*}polyline")
    assert [len(curve.attrib["points"].split()) for curve in curves] == [28, 28, 36, 36]


def test_a_curve_falls_from_what_enters() -> None:
    curve = plot_omnidrop.curve("omnidrop/7b/30", 44.4)
    assert curve.retained[0] == 44.4
    assert (curve.retained[1:] <= curve.retained[:-1]).all()
