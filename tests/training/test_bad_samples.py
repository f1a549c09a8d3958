"""Bad files are replaced the same way on every visit, and written down once per run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omnisieve.data.batch import BadSample, LoweredFps, Sample
from omnisieve.data.dataset import MediaLoader, OmniDataset
from omnisieve.data.manifest import Manifest
from omnisieve.data.preprocess import Preprocessor
from omnisieve.data.sampler import StreamSampler
from omnisieve.training.bad_samples import BAD_SAMPLES_FILE, SampleReport
from omnisieve.training.errors import OutputError
from tests.data.media_files import FAULTS, MediaSpec, write_faulty, write_media
from tests.data.stock import rules, stock_processor

GOOD = 12


class Peers:
    """Two ranks in one process: what a rank gathers is what both have pending."""

    def __init__(self, folder: Path) -> None:
        self.reports = [SampleReport(folder, Peer(self, rank), BadSample) for rank in range(2)]  # type: ignore[arg-type]

    def share(self) -> None:
        self.pending = [list(report._pending.values()) for report in self.reports]
        for report in self.reports:
            report.share()


class Alone:
    is_first = True

    def gather(self, value: Any) -> list[Any]:
        return [value]


class Peer:
    def __init__(self, peers: Peers, rank: int) -> None:
        self.peers, self.is_first = peers, rank == 0

    def gather(self, value: Any) -> list[Any]:
        assert value in self.peers.pending
        return self.peers.pending


def written(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / BAD_SAMPLES_FILE).read_text().splitlines()]


def bad(path: str, **changes: str) -> BadSample:
    return replace(BadSample("1", path, "empty", "the file has 0 bytes", "copy it", "2"), **changes)


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    report = SampleReport(tmp_path / "gone", Alone(), BadSample)  # type: ignore[arg-type]
    report.note([bad("a")])
    with pytest.raises(OutputError, match=r"list of samples to .*gone/bad_samples\.jsonl: No such file"):
        report.share()


def test_ranks_write_each_file_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers = Peers(tmp_path)
    peers.share()
    assert not (tmp_path / BAD_SAMPLES_FILE).exists()
    first, second = peers.reports
    first.note([bad("a"), bad("b"), bad("a")])
    second.note([bad("b"), bad("c", reason="cut")])
    peers.share()
    second.note([bad("a")])
    first.note([bad("d")])
    peers.share()
    assert [line["path"] for line in written(tmp_path)] == ["a", "b", "c", "d"]
    assert written(tmp_path)[2] == {
        "id": "1", "path": "c", "kind": "empty", "reason": "cut", "cure": "copy it", "replacement": "2",
    }  # fmt: skip
    told = capsys.readouterr().err
    assert told.count("replaced sample 1 by 2: ") == 4


def test_a_run_that_goes_on_adds_to_its_file(tmp_path: Path) -> None:
    before = Peers(tmp_path)
    before.reports[1].note([bad("a"), bad("b")])
    before.share()
    path = tmp_path / BAD_SAMPLES_FILE
    path.write_text(path.read_text() + '{"path": "half')
    after = Peers(tmp_path)
    after.reports[0].note([bad("c")])
    after.reports[1].note([bad("b")])
    after.share()
    assert [line["path"] for line in written(tmp_path)] == ["a", "b", "c"]


def test_lowered_frame_rates_are_written_once_to_a_file_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lowered = LoweredFps("1", ("a.mp4",), (2.0,), (0.5,), 900, 400)
    for _ in range(2):  # a run, and one that goes on
        report = SampleReport(tmp_path, Alone(), LoweredFps)  # type: ignore[arg-type]
        for _ in range(2):
            report.note([lowered])
            report.share()
    (line,) = (tmp_path / "lowered_fps.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "id": "1", "paths": ["a.mp4"], "fps_was": [2.0], "fps": [0.5], "tokens_was": 900, "tokens": 400,
    }  # fmt: skip
    assert capsys.readouterr().err.count("sample 1: 900 tokens are too many, 400 at fewer fps (2 to 0.5)") == 1


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A dozen good clips, and one of each fault between them."""
    folder = tmp_path_factory.mktemp("bad")
    write_media(folder / "good.mp4", MediaSpec(seconds=1.0))
    names = [f"{fault}.mp4" for fault in FAULTS]
    for fault, name in zip(FAULTS, names, strict=True):
        write_faulty(folder / name, fault)
    files = ["good.mp4"] * GOOD
    for index, name in enumerate(names):
        files.insert(2 * index, name)
    lines = [
        {"id": f"{index}", "messages": [
            {"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "A clip."},
        ], "videos": [name]}
        for index, name in enumerate(files)
    ]  # fmt: skip
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Manifest(folder / "m.jsonl")


def epoch(dataset: OmniDataset, world_size: int, folder: Path) -> list[tuple[str, ...]]:
    """Ids of the global batches of two epochs; what was bad is written down."""
    folder.mkdir()
    peers = Peers(folder)
    streams = [
        iter(StreamSampler(len(dataset), 4 // world_size, seed=3, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    batches = []
    for _ in range(2 * len(dataset) // 4):
        ids: list[str] = []
        for stream, report in zip(streams, peers.reports, strict=False):
            samples: list[Sample] = [dataset[index] for index in next(stream)]
            report.note(found for sample in samples for found in sample.failures)
            ids += [sample.id for sample in samples]
        batches.append(tuple(ids))
        peers.share()
    return batches


def test_eight_kinds_of_bad_files_are_replaced_and_reported_once(manifest: Manifest, tmp_path: Path) -> None:
    loader = MediaLoader(Preprocessor(stock_processor(), rules(), min_pixels=56 * 56, max_pixels=56 * 56))
    dataset = OmniDataset(manifest, loader, on_error="replace")
    alone, together = (epoch(dataset, size, tmp_path / str(size)) for size in (1, 2))
    assert alone == together
    assert all(len(batch) == 4 for batch in alone)
    broken = {line.id: line.media[0].path for line in manifest if line.media[0].path.name != "good.mp4"}
    assert not broken.keys() & {id for batch in alone for id in batch}
    for size in ("1", "2"):
        lines = written(tmp_path / size)
        assert {line["path"]: line["kind"] for line in lines} == {
            str(path): FAULTS[path.stem] for path in broken.values()
        }
        assert len(lines) == len(FAULTS) == 8
        assert all(line["path"] == str(broken[line["id"]]) and line["replacement"] not in broken for line in lines)
        assert all(line["reason"] and line["cure"] for line in lines)
    loader.reader.close()
