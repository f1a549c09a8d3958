"""`--help` of the programs and tools: what it says of methods, and of the program itself."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from omnisieve.compressors import CompressorError, list_compressors
from omnisieve.method_help import describe_methods

ROOT = Path(__file__).resolve().parents[1]


def test_every_method_has_a_line() -> None:
    lines = [line.split(maxsplit=1) for line in describe_methods().splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == list_compressors()
    texts = dict(lines)
    assert all(len(text) > 10 for text in texts.values())
    assert texts["omnisift"].endswith("is trained")
    assert texts["fastv"] == f"{texts['fastv_om']}; audio stays whole"


def test_a_method_has_its_fields_and_presets() -> None:
    text = describe_methods("omnisift")
    assert "\n  video_pruner: one of learned, similarity, default learned\n      " in text
    assert "\n  retained_ratio: float or null, default null\n      " in text
    assert "\n  omnisift/7b/35: 35%, OmniSIFT" in text
    assert "seats/7b" not in text
    assert "Presets" not in describe_methods("full")


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(CompressorError, match="did you mean 'omnisift'"):
        describe_methods("omnisft")


@pytest.mark.parametrize(
    "program", ["train.py", "eval.py", "tools/cache_features.py", "tools/tune_split.py", "tools/check_toolchain.py"]
)
def test_a_program_says_what_it_does(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (ROOT / program).read_text()
    printed = run(program, ["--help"], monkeypatch, capsys)
    assert source[3:].partition("\n")[0] in printed
    if "load_config" in source:
        assert describe_methods() in printed
        assert run(program, ["--help", "stvp"], monkeypatch, capsys).strip() == describe_methods("stvp")


def run(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a program prints before it ends well."""
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert not stop.value.code
    return capsys.readouterr().out
