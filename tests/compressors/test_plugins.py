"""Files outside the package that register methods."""

from __future__ import annotations

from pathlib import Path

import pytest

from omnisieve.compressors import CompressorError, base, build_compressor
from omnisieve.compressors.plugins import load_plugin

METHOD = """
from omnisieve.compressors.base import register
from omnisieve.compressors.random import Random

@register({name!r})
class Method(Random):
    pass
"""


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_files_may_be_called_alike_and_are_run_once(tmp_path: Path) -> None:
    """Also like a module that everybody uses."""
    for name in ("one", "two", "one"):
        load_plugin(write(tmp_path / name / "random.py", METHOD.format(name=name)))
    assert [build_compressor(name, retained_ratio=0.5).name for name in ("one", "two")] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.py", None, "missing.py is no file"),
        ("notes.txt", "x = 1", "notes.txt is no Python file"),
        ("empty.py", "x = 1", "empty.py registers no method"),
        ("taken.py", METHOD.format(name="stvp"), "named 'stvp' is registered already: Stvp"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    for _ in range(2):  # a file that failed is not taken for one that was loaded
        with pytest.raises(CompressorError, match=message):
            load_plugin(write(tmp_path / name, text) if text else tmp_path / name)
