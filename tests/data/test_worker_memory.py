"""A decoding worker and the child that decodes for it do not grow, however many clips they have read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import Dataset

from omnisieve.data.dataset import MediaLoader, OmniDataset
from omnisieve.data.manifest import Manifest
from omnisieve.data.preprocess import Preprocessor
from omnisieve.data.read_ahead import ReadAhead
from tests.data.media_files import MediaSpec, write_faulty, write_media
from tests.data.stock import rules, stock_processor

CLIPS, WARM_UP, MOST_GROWTH_MB = 2000, 200, 50
GOOD = {
    "small": MediaSpec(seconds=1.0, rate=4),
    "large": MediaSpec(seconds=1.0, rate=4, width=320, height=240, sample_rate=44_100, channels=2),
    "tall": MediaSpec(seconds=1.5, rate=4, width=96, height=224),
    "silent": MediaSpec(seconds=2.0, rate=4, audio_seconds=0.0),
    "long_sound": MediaSpec(seconds=1.0, rate=4, audio_seconds=4.0),
}
BROKEN = ("half", "no_index", "noise")


def resident_mb(process: int | str) -> float:
    """Memory of a process that is in RAM."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


class Measured(Dataset[tuple[str, int, float, float]]):
    """For each sample its id, the process that read it, and the memory of that and of its decoder, in MB."""

    def __init__(self, dataset: OmniDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return CLIPS

    def __getitem__(self, index: int) -> tuple[str, int, float, float]:
        sample = self.dataset[index % len(self.dataset)]
        decoder = self.dataset.loader.reader._child
        assert decoder is not None
        return sample.id, os.getpid(), resident_mb("self"), resident_mb(decoder.pid)


@pytest.mark.slow
def test_memory_of_a_worker_is_flat_over_two_thousand_clips(tmp_path: Path) -> None:
    for name, spec in GOOD.items():
        write_media(tmp_path / f"{name}.mp4", spec)
    for fault in BROKEN:
        write_faulty(tmp_path / f"{fault}.mp4", fault)
    lines = [
        {"messages": [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "A clip."}],
         "videos": [f"{name}.mp4"], "id": name}
        for name in (*GOOD, *BROKEN, *GOOD)
    ]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loader = MediaLoader(Preprocessor(stock_processor(), rules(), min_pixels=56 * 56, max_pixels=224 * 224))
    dataset = OmniDataset(Manifest(tmp_path / "m.jsonl"), loader, on_error="replace")
    ids, processes, worker, decoder = zip(*ReadAhead(Measured(dataset), num_workers=1), strict=True)
    assert len(ids) == CLIPS
    assert set(ids) <= set(GOOD)
    assert len(set(processes)) == 1
    for memory in (np.array(worker[WARM_UP:]), np.array(decoder[WARM_UP:])):
        assert memory.max() - memory[0] < MOST_GROWTH_MB
