"""Files are written whole or not at all, and over nothing that is not ours."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from omnisieve.files import NotOursError, clean_up, remove, replacing, write_text

OURS = {Path("a"), Path("b"), Path("deep/c")}


def ours(path: Path) -> bool:
    return path in OURS


def write(target: Path, **files: str) -> None:
    with replacing(target, ours) as staged:
        fill(staged, **files)


def fill(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_replaced_and_the_rest_of_it_stays(tmp_path: Path) -> None:
    target = tmp_path / "x" / "out"
    write(target, a="1", b="1", deep_c="1")
    fill(target, notes="mine", **{".git_config": "mine", "deep_notes": "mine", "model_a": "mine"})
    (target / "link").symlink_to(tmp_path)
    (target / ".git" / "refs").mkdir()
    write(target, a="2")
    mine = {"notes": "mine", ".git/config": "mine", "deep/notes": "mine", "model/a": "mine"}
    assert content(target) == {"a": "2", **mine}
    assert (target / "link").is_symlink()
    assert (target / ".git" / "refs").is_dir()
    write(target, a="3", deep_c="3")
    assert content(target) == {"a": "3", "deep/c": "3", **mine}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_what_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    fill(target, notes="mine", a="older")
    with pytest.raises(NotOursError, match="out/notes is there and was not written by this program"):
        write(target, a="2", notes="2")
    assert content(target) == {"notes": "mine", "a": "older"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotOursError, match="file is there"):
        write(tmp_path / "file", a="2")
    with pytest.raises(NotOursError, match="file is there"):
        write_text(tmp_path / "file", "2", lambda path: path.read_text() == "ours")
    with pytest.raises(NotOursError, match="out is there"):
        write_text(target, "2")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "out", a="1")
    with suppress(ZeroDivisionError), replacing(tmp_path / "out", ours) as staged:
        fill(staged, a="2")
        raise ZeroDivisionError
    assert content(tmp_path) == {"out/a": "1"}


def test_a_link_leads_to_what_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", a="1")
    write(tmp_path / "link", a="2")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == {"a": "2"}


@pytest.mark.parametrize("moment", [1, 2, 3, 4])
def test_a_kill_loses_nothing(moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever rename is the last, the next writer, or a clean-up, finds all that was there."""
    target = tmp_path / "out"
    write(target, a="1")
    fill(target, notes="mine", deep_notes="mine")
    calls = 0
    rename = Path.rename

    def killed(self: Path, to: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == moment:
            raise KeyboardInterrupt
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write(target, a="2")
    (tmp_path / ".out.abc.partial").mkdir()
    clean_up(target, ours)
    assert content(tmp_path) == {"out/a": "1" if moment < 3 else "2", "out/notes": "mine", "out/deep/notes": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_what_is_ours_is_removed(tmp_path: Path) -> None:
    fill(tmp_path / "out", a="1", deep_c="1")
    remove(tmp_path / "out", ours)
    assert not (tmp_path / "out").exists()
    fill(tmp_path / "out", a="1", deep_c="1", notes="mine")
    remove(tmp_path / "out", ours)
    assert content(tmp_path) == {"out/notes": "mine"}
    remove(tmp_path / "gone", ours)
