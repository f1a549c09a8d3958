"""Two ranks of a process group write one list of bad files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omnisieve.data.batch import BadSample
from omnisieve.training.bad_samples import BAD_SAMPLES_FILE, BadSamples
from omnisieve.training.distributed import Ranks
from tests.distributed.launch import run_distributed


def job(ranks: Ranks, folder: Path) -> None:
    report = BadSamples(folder, ranks)
    for _ in range(2):
        report.note(BadSample("1", path, "empty", "", "", "2") for path in (f"of rank {ranks.rank}", "of both"))
        report.share()


@pytest.mark.slow
def test_ranks_write_one_list(tmp_path: Path) -> None:
    run_distributed(job, tmp_path)
    lines = (tmp_path / BAD_SAMPLES_FILE).read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["of rank 0", "of both", "of rank 1"]
