"""Options of the test suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# No test asks the network; libraries read this when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        type=Path,
        default=None,
        help="folder of vector files for tests/goldens (default: the committed ones)",
    )
