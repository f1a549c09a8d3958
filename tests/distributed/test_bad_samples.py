"""Two ranks, bad files: one list of them, and a run that does not notice, whole or in parts."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from omnisieve.data.batch import BadSample
from omnisieve.data.sampler import StreamSampler
from omnisieve.training.bad_samples import BAD_SAMPLES_FILE, SampleReport
from omnisieve.training.distributed import Ranks
from tests.data.media_files import FAULTS, MediaSpec, write_faulty, write_media
from tests.distributed.launch import run_distributed
from tests.distributed.programs import arguments, largest_difference, lasting_log, two_ranks

SIZE, PER_STEP, STEPS = 180, 8, 26  # an epoch and a bit
OPTIONS = (
    "data.val=null", "data.workers=1", "data.max_pixels=3136", "train.micro_batch_size=4", f"train.max_steps={STEPS}",
    "train.eval_every=0", "train.save_every=0", "train.log_every=1", "compressor.audio_ratio=null",
    "compressor.retained_ratio=0.5",
)  # fmt: skip


def job(ranks: Ranks, folder: Path) -> None:
    report = SampleReport(folder, ranks, BadSample)
    for _ in range(2):
        report.note(BadSample("1", path, "empty", "", "", "2") for path in (f"of rank {ranks.rank}", "of both"))
        report.share()


@pytest.mark.slow
def test_ranks_write_one_list(tmp_path: Path) -> None:
    run_distributed(job, tmp_path)
    assert [line["path"] for line in reported(tmp_path)] == ["of rank 0", "of both", "of rank 1"]


def reported(run: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (run / BAD_SAMPLES_FILE).read_text().splitlines()]


def boxes(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Name and end of each box of an mp4 file."""
    position = 0
    while position < len(content):
        length, name = struct.unpack(">I4s", content[position : position + 8])
        position += length
        yield name, position


def without_frames(path: Path) -> None:
    """Headers that promise streams, and nothing behind them."""
    spec = MediaSpec(seconds=1.0, options=(("movflags", "frag_keyframe+empty_moov"),))
    content = write_media(path, spec).read_bytes()
    path.write_bytes(content[: dict(boxes(content))[b"moov"]])


def with_noise_in(stream: str) -> Callable[[Path], None]:
    """Every packet of a stream is overwritten."""

    def write(path: Path) -> None:
        content = bytearray(write_media(path, MediaSpec(seconds=1.0)).read_bytes())
        noise = np.random.default_rng(0)
        with av.open(str(path)) as container:
            for packet in container.demux():
                if packet.size and packet.stream.type == stream:
                    content[packet.pos : packet.pos + packet.size] = noise.bytes(packet.size)
        path.write_bytes(content)

    return write


# A file that is missing is no replaced sample: the start refuses it.
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    **{name: (lambda path, name=name: write_faulty(path, name), FAULTS[name])
       for name in ("empty", "text", "no_index", "half", "noise", "no_video")},
    "no_frames": (without_frames, "truncated"),
    "no_sound": (with_noise_in("audio"), "corrupt"),
    "no_pictures": (with_noise_in("video"), "corrupt"),
}  # fmt: skip


def write_set(folder: Path) -> dict[str, int]:
    """`train.jsonl`: videos with and without sound, and sounds; one in twenty is bad.

    Returns:
        the place in the manifest of each bad file, by its name.
    """
    good = [
        ("videos", write_media(folder / "sounding.mp4", MediaSpec(seconds=1.0)).read_bytes()),
        ("videos", write_media(folder / "silent.mp4", MediaSpec(seconds=1.5, audio_seconds=0.0)).read_bytes()),
        ("audios", write_media(folder / "sound.wav", MediaSpec(0.0, audio_seconds=1.0, audio_codec="pcm_s16le"))
         .read_bytes()),
    ]  # fmt: skip
    places, lines = {}, []
    bad = iter(BAD.items())
    for index in range(SIZE):
        kind, content = good[index % len(good)]
        name = f"{index}.{'wav' if kind == 'audios' else 'mp4'}"
        if index % 20 == 7:
            kind, (fault, (write, _)) = "videos", next(bad)
            name = f"{fault}.mp4"
            write(folder / name)
            places[name] = index
        else:
            (folder / name).write_bytes(content)
        question = {"role": "user", "content": f"<{kind.removesuffix('s')}>What is it?"}
        messages = [question, {"role": "assistant", "content": f"number {index % 10}"}]
        lines.append(json.dumps({"id": str(index), "messages": messages, kind: [name]}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    return places


def a_step_with(places: set[int]) -> int:
    """A step in the middle of the first epoch in which one of these samples is replaced."""
    batches = iter(StreamSampler(SIZE, PER_STEP))
    steps = [step for step in range(1, SIZE // PER_STEP) if places & set(next(batches))]
    return steps[len(steps) // 2]


@pytest.mark.slow
def test_one_bad_file_in_twenty_changes_nothing_but_the_list_of_them(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    places = write_set(files)
    assert len(places) == len(BAD) == SIZE / 20
    middle = a_step_with(set(places.values()))
    assert 1 < middle < SIZE / PER_STEP - 1
    for folder, *more in (("whole",), ("parts", f"train.stop_at={middle}"), ("parts",)):
        for status, output in two_ranks(*arguments(files, tmp_path / folder, *OPTIONS, *more)):
            assert status == 0, output
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert largest_difference(whole, parts) == 0
    assert lasting_log(whole) == lasting_log(parts)
    for run in (whole, parts):
        lines = reported(run)
        kinds = {str(files / f"{name}.mp4"): kind for name, (_, kind) in BAD.items()}
        assert {line["path"]: line["kind"] for line in lines} == kinds
        assert len(lines) == len(BAD)
        assert not {line["replacement"] for line in lines} & {str(place) for place in places.values()}
        state = json.loads((run / "checkpoints" / f"checkpoint-{STEPS}" / "state.json").read_text())
        assert state["sampler"]["position"] == STEPS * PER_STEP
