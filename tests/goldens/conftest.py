"""Vector files become test parameters: every file below the folder that `--goldens` names."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.goldens.vectors import resolver

COMMITTED = Path(__file__).parent / "vectors"


def vector_files(folder: Path) -> list[Path]:
    """Every file below `folder`, in a stable order."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".npz", ".json"))


def vector_name(path: Path) -> str:
    """The name that prefixes are compared with; model inputs are known by their folder."""
    return f"inputs/{path.stem}" if path.parent.name == "inputs" else path.stem


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vector_file" in metafunc.fixturenames:
        folder = metafunc.config.getoption("goldens") or COMMITTED
        if not folder.is_dir():
            raise pytest.UsageError(f"--goldens {folder}: there is no such folder")
        files = vector_files(folder)
        if not files:
            raise pytest.UsageError(f"--goldens {folder}: no vector file (*.npz, *.json) below it")
        metafunc.parametrize("vector_file", files, ids=[str(f.relative_to(folder)) for f in files])


@pytest.fixture(scope="session")
def related(pytestconfig: pytest.Config):
    """Loads the file that a vector file names."""
    return resolver(pytestconfig.getoption("goldens") or COMMITTED, COMMITTED)
