"""The log of a run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from omnisieve.training.errors import OutputError
from omnisieve.training.scores import Distribution, moments
from omnisieve.training.tracking import Tracker


def write(folder: Path, steps: range, *, first_step: int = 0) -> None:
    tracker = Tracker(folder, first_step=first_step)
    for step in steps:
        tracker.log(step, {"train/loss": 1.0 / step})
    tracker.close()


def logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_json_lines_and_events_hold_the_same_scalars(tmp_path: Path):
    write(tmp_path, range(1, 4))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == [{"step": step, "train/loss": 1.0 / step} for step in (1, 2, 3)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == [1, 2, 3]
    assert events[2].value - 1 / 3 < 1e-6


def test_what_lies_beyond_the_resumed_step_is_dropped(tmp_path: Path):
    write(tmp_path, range(1, 6))
    write(tmp_path, range(4, 6), first_step=3)
    assert logged(tmp_path) == [1, 2, 3, 4, 5]


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path):
    write(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tra')
    write(tmp_path, range(4, 6), first_step=4)
    assert logged(tmp_path) == [1, 2, 3, 4, 5]


def test_other_ranks_write_nothing(tmp_path: Path):
    tracker = Tracker(tmp_path, enabled=False)
    tracker.log(1, {"train/loss": 1.0})
    tracker.histograms(1, {})
    tracker.pictures(1, {"clip": np.zeros((5, 5, 3), np.uint8)})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_histograms_are_events_that_hold_the_counts(tmp_path: Path):
    scores = torch.rand(1, 500, generator=torch.Generator().manual_seed(0))
    sums = moments(scores, scores >= 0).numpy()
    found = Distribution(sums[2:], sums[0], sums[1])
    tracker = Tracker(tmp_path)
    tracker.histograms(3, {"score/video": found})
    tracker.close()
    (event,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Histograms("score/video")
    held = event.histogram_value
    assert (event.step, held.num, sum(held.bucket)) == (3, 500, 500)
    assert held.min <= float(scores.min())
    assert float(scores.max()) <= held.max == held.bucket_limit[-1]
    below = sum(n for n, limit in zip(held.bucket, held.bucket_limit, strict=True) if limit <= 0.5)
    assert abs(below - int((scores <= 0.5).sum())) <= 5
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def draw(folder: Path, steps: range, *, first_step: int = 0, limit: int = 20) -> None:
    tracker = Tracker(folder, first_step=first_step, picture_limit=limit)
    for step in steps:
        colour = np.full((20, 30, 3), step, dtype=np.uint8)
        tracker.pictures(step, {"a/b c": colour, "d": colour})
    tracker.close()


def drawn(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "images").iterdir())


def test_pictures_are_files_and_events(tmp_path: Path):
    draw(tmp_path, range(7, 8))
    assert drawn(tmp_path) == ["step-0000007-a_b_c.png", "step-0000007-d.png"]
    assert np.asarray(Image.open(tmp_path / "images" / "step-0000007-d.png"))[3, 4].tolist() == [7, 7, 7]
    (event,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("clips/a/b c")
    assert (event.step, event.width, event.height) == (7, 30, 20)


def test_the_newest_pictures_stay(tmp_path: Path):
    draw(tmp_path, range(1, 12), limit=2)
    assert drawn(tmp_path) == [f"step-00000{step}-{name}.png" for step in (10, 11) for name in ("a_b_c", "d")]


def test_pictures_beyond_the_resumed_step_are_dropped(tmp_path: Path):
    draw(tmp_path, range(1, 6))
    draw(tmp_path, range(4, 4), first_step=3)
    assert {name.split("-")[1] for name in drawn(tmp_path)} == {f"000000{step}" for step in (1, 2, 3)}


def test_a_picture_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "images").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write pictures"):
        draw(tmp_path, range(1, 2))
