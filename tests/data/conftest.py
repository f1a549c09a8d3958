from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from omnisieve.data.media import MediaReader
from tests.data.media_files import MediaSpec, write_media


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`media("clip.mp4", rate=25)`: the path of such a file, written once per session."""
    folder = tmp_path_factory.mktemp("media")

    def make(name: str, **spec: object) -> Path:
        path = folder / name
        return path if path.exists() else write_media(path, MediaSpec(**spec))

    return make


@pytest.fixture(scope="session")
def reader() -> Iterator[MediaReader]:
    reader = MediaReader(decode_seconds=30)
    yield reader
    reader.close()
