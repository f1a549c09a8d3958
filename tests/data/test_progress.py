from __future__ import annotations

from pathlib import Path

import pytest

from omnisieve.data import progress
from omnisieve.data.progress import Progress


def test_processes_hear_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    first, second = (Progress(tmp_path, rank, 2) for rank in range(2))
    first.report(3)
    assert first.total == 3
    second.report(4)
    first.report(5)
    assert first.total == 9
    assert first.results() is None
    first.finish(6, {"shards": ["a"]})
    assert first.results() is None
    second.finish(5, {"shards": []})
    assert first.results() == [{"shards": ["a"]}, {"shards": []}]
    assert first.total == 11


def test_it_does_not_write_for_every_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 1e6)
    one = Progress(tmp_path, 0, 1)
    one.report(1)
    (tmp_path / "0.json").unlink()
    for done in range(2, 50):
        one.report(done)
    assert not (tmp_path / "0.json").exists()
