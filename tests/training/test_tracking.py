"""The log of a run."""

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
    tracker.close()
    assert list(tmp_path.iterdir()) == []
