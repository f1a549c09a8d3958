"""Damaged files of every kind through the check, a training epoch and an evaluation: each is used or named, once.

Nothing is known of what the damage does to a file: a flipped bit may leave it as good as before. What must hold is that
no exception gets through, that nothing of the others is lost, and that check, training and evaluation agree.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tools import check_data

from omnisieve.backbones import Estimator, adapter_for, load_backbone
from omnisieve.backbones.media import media_loader
from omnisieve.config import EvalConfig, TrainConfig, read_config
from omnisieve.data.batch import BadSample
from omnisieve.data.manifest import Manifest, ManifestError
from omnisieve.evaluation.evaluate import evaluate
from omnisieve.training import check_run
from omnisieve.training.bad_samples import BAD_SAMPLES_FILE, SampleReport
from omnisieve.training.build import make_compressor
from omnisieve.training.objective import TrainingModule
from omnisieve.training.streams import open_streams
from tests.data.media_files import MediaSpec, write_media
from tests.data.stock import BACKBONE
from tests.distributed.programs import finish, start
from tests.training.runs import Alone

HEALTHY = ("clip.mp4", "clip.mp4", "tone.wav", "still.png", "clip.mp4", "")
RECIPE = """
model: {{path: {backbone}, dtype: float32}}
compressor: {{method: omnisift, retained_ratio: 0.4, width: 16, heads: 2}}
data: {{train: {folder}/m.jsonl, max_frames: 4, min_pixels: 3136, max_pixels: 3136, decode_seconds: 20, workers: 0}}
train: {{max_steps: {steps}, micro_batch_size: 2, eval_every: 0, save_every: 0}}
output_dir: {folder}/run
"""
EVAL = """
model: {{path: {backbone}, dtype: float32}}
manifest: {folder}/m.jsonl
methods: [random]
ratios: [0.5]
max_new_tokens: 1
data: {{max_frames: 4, min_pixels: 3136, max_pixels: 3136, decode_seconds: 20, workers: 0}}
output_dir: {folder}/eval
"""


def film(codec: str, audio: str = "aac", rate: int = 16_000) -> Callable[[Path], Any]:
    spec = MediaSpec(seconds=1.0, video_codec=codec, audio_codec=audio, sample_rate=rate, width=64, height=48)
    return lambda path: write_media(path, spec)


def sound(codec: str, rate: int = 16_000) -> Callable[[Path], Any]:
    return lambda path: write_media(path, MediaSpec(0.0, audio_seconds=1.0, audio_codec=codec, sample_rate=rate))


def still(path: Path, frames: int = 1) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (frames, 48, 64, 3), np.uint8)
    first, *others = map(Image.fromarray, noise)
    first.save(path, **({"save_all": True, "append_images": others} if others else {}))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.mp4": film("libx264"), "a.mov": film("libx264"), "a.mkv": film("libx264"), "a.avi": film("mpeg4", "libmp3lame"),
    "a.webm": film("libvpx-vp9", "libopus", 48_000), "a.ts": film("libx264"), "a.flv": film("libx264"),
    "a.wav": sound("pcm_s16le"), "a.mp3": sound("libmp3lame"), "a.flac": sound("flac"), "a.m4a": sound("aac"),
    "a.ogg": sound("libopus", 48_000), "a.aiff": sound("pcm_s16be"), "a.mka": sound("aac"),
    "a.png": still, "a.jpg": still, "a.webp": still, "a.tif": still, "a.gif": still, "a.avif": still,
    "b.gif": lambda path: still(path, frames=3),
}  # fmt: skip
_KINDS = {"audio": "wav mp3 flac m4a ogg aiff mka", "image": "png jpg webp tif gif avif"}
KIND_OF = {suffix: kind for kind, suffixes in _KINDS.items() for suffix in suffixes.split()}


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Contents of files without damage, by name."""
    folder = tmp_path_factory.mktemp("whole")
    for name, write in WRITERS.items():
        write(folder / name)
    film("libx264")(folder / "clip.mp4")
    sound("pcm_s16le")(folder / "tone.wav")
    still(folder / "still.png")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damaged(content: bytes, chance: np.random.Generator) -> bytes:
    """Random bytes, the same file cut, or with bits flipped: anywhere, or at its start where headers are."""
    found = bytearray(content)
    size = len(found)
    way = chance.choice(["bytes", "head", "cut", "flips", "flips at start", "zeros"])
    if way == "bytes":
        return chance.bytes(size)
    if way == "head":
        kept = int(chance.integers(4, 200))
        return content[:kept] + chance.bytes(size)
    if way == "cut":
        return content[: int(chance.integers(0, size))]
    if way == "zeros":
        first = int(chance.integers(0, size))
        return content[:first] + bytes(min(500, size - first)) + content[first + 500 :]
    reach = size if way == "flips" else min(size, 400)
    for place in chance.integers(0, reach, int(chance.integers(1, 30))).tolist():
        found[place] ^= 1 << int(chance.integers(8))
    return bytes(found)


def line(id: str, name: str) -> dict[str, Any]:
    suffix = name.rpartition(".")[2]
    kind = KIND_OF.get(suffix, "video")
    media = [{"type": kind, kind: name}] if name else []
    asked = [*media, {"type": "text", "text": "What is this?"}]
    return {"id": id, "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "red"}]}


def write_world(folder: Path, whole: dict[str, bytes], seed: int) -> None:
    """A manifest of a damaged file of each kind, and some healthy lines between them; recipes for both programs."""
    chance = np.random.default_rng(seed)
    lines = []
    for index, name in enumerate(WRITERS):
        (folder / f"{index}_{name}").write_bytes(damaged(whole[name], chance))
        lines.append(line(f"bad {index}", f"{index}_{name}"))
    for index, name in enumerate(HEALTHY):
        if name:
            (folder / name).write_bytes(whole[name])
        lines.insert(4 * index, line(f"good {index}", name))
    # What no file has, and no text.
    lines.append(line("long path", "a" * 5000 + ".mp4"))
    lines.append(line("null", "a\0.wav"))
    Image.new("RGB", (3000, 4)).save(folder / "thin.png")
    lines.append(line("thin", "thin.png"))
    marked = line("marked", "clip.mp4")
    marked["messages"][0]["content"][1]["text"] = "What is <|VIDEO|>?"
    lines.append(marked)
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    steps = -(-len(lines) // 2)
    (folder / "train.yaml").write_text(RECIPE.format(folder=folder, backbone=BACKBONE, steps=steps))
    (folder / "eval.yaml").write_text(EVAL.format(folder=folder, backbone=BACKBONE))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []


def epoch(config: TrainConfig) -> Iterator[str]:
    """Ids of the samples that an epoch trains on, without DeepSpeed; writes the list of bad samples."""
    assert any("<|VIDEO|>" in remark for remark in check_run(config))
    backbone = load_backbone(config.model.path, config.model.dtype)
    adapter = adapter_for(backbone)
    compressor = make_compressor(config, adapter.hidden_size)
    media = media_loader(config.model.path, adapter, config.data)
    module = TrainingModule(backbone, compressor, estimator=Estimator("masked"))
    ranks: Any = Alone()
    ranks.gather = lambda value: [value]
    report = SampleReport(Path(config.output_dir), ranks, BadSample)
    streams = open_streams(config.data, config.train, media, compressor, ranks)
    with module.attached():
        for batch in itertools.islice(streams.train, config.train.max_steps):
            module(batch)["loss"].backward()
            report.note(batch.failures)
            report.share()
            assert len(batch.ids) == config.train.micro_batch_size
            yield from batch.ids
    media.reader.close()


def assert_sound(folder: Path, report: dict[str, Any]) -> None:
    """What check, training and evaluation of a world have left names each line that cannot be used, once.

    The check, training and evaluation agree.
    """
    ids = [conversation.id for conversation in Manifest(folder / "m.jsonl")]
    files = rows(folder / "check" / "files.jsonl")
    assert max(Counter((row["path"], row["kind"]) for row in files).values()) == 1
    problems = {row["path"]: row["problem"] for row in files if row["problem"]}
    assert all(problem["reason"] and problem["action"] for problem in problems.values())
    samples = rows(folder / "check" / "samples.jsonl")
    assert [row["id"] for row in samples] == ids
    found = {row["id"] for row in samples if row["problem"]}
    media = {conversation.id: conversation.file for conversation in Manifest(folder / "m.jsonl")}
    found |= {id for id in ids if media[id] in problems}
    listed = rows(folder / "run" / BAD_SAMPLES_FILE)
    bad = {row["id"] for row in listed}
    assert len(bad) == len(listed)
    assert bad == found
    assert {"long path", "null", "thin", "marked"} <= bad
    assert not {row["replacement"] for row in listed} & bad
    assert not any(id.startswith("good") for id in found)
    failed = Counter(failure["clip"] for failure in report["failures"])
    assert failed == Counter(media[id] for id in bad)
    (row,) = report["rows"]
    assert (row["n_questions"], row["n_failures"]) == (len(ids) - len(bad), len(bad))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads would cost more than such small tensors are worth."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 30))])
def test_every_damaged_file_is_used_or_named_once(
    tmp_path: Path, whole: dict[str, bytes], seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write_world(tmp_path, whole, seed)
    recipe = str(tmp_path / "train.yaml")
    manifest = str(tmp_path / "m.jsonl")
    options = ["--config", recipe, "--report", str(tmp_path / "check"), "--workers", "0", "--decode"]
    assert check_data.main([manifest, *options]) == 1
    trained = set(epoch(read_config(TrainConfig, recipe)))
    report, _ = evaluate(read_config(EvalConfig, str(tmp_path / "eval.yaml")))
    assert_sound(tmp_path, report)
    bad = {row["id"] for row in rows(tmp_path / "run" / BAD_SAMPLES_FILE)}
    assert trained == {conversation.id for conversation in Manifest(manifest)} - bad
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 104))
def test_the_programs_come_to_their_end(tmp_path: Path, whole: dict[str, bytes], seed: int) -> None:
    write_world(tmp_path, whole, seed)
    recipe = ("--config", str(tmp_path / "train.yaml"))
    report = ("--report", str(tmp_path / "check"), "--decode")
    for expected, command in (
        (1, ["tools/check_data.py", str(tmp_path / "m.jsonl"), *recipe, *report]),
        (0, ["train.py", *recipe]),
        (0, ["eval.py", "--config", str(tmp_path / "eval.yaml")]),
    ):
        status, output = finish(start([sys.executable, *command]))
        assert status == expected, output
        assert "Traceback" not in output
    assert_sound(tmp_path, json.loads((tmp_path / "eval" / "report.json").read_text()))


def damaged_manifest(seed: int) -> bytes:
    texts = [line("1", ""), line("2", "clip.mp4"), line("3", "tone.wav"), line("4", "")]
    content = "".join(json.dumps(row) + "\n" for row in texts).encode()
    return damaged(content, np.random.default_rng(seed))


@pytest.mark.parametrize("seeds", [range(150), pytest.param(range(150, 20_000), marks=pytest.mark.slow)])
def test_a_damaged_manifest_is_read_or_refused_in_one_message(tmp_path: Path, seeds: range) -> None:
    for name in ("clip.mp4", "tone.wav"):
        (tmp_path / name).write_bytes(b"content")
    path = tmp_path / "m.jsonl"
    refused = 0
    for seed in seeds:
        path.write_bytes(damaged_manifest(seed))
        told = str(path)
        try:
            Manifest(path).check()
        except ManifestError as error:
            refused += 1
            told = str(error)
        else:
            for conversation in Manifest(path):
                list(conversation.questions())
        assert told.startswith(str(path))
        assert len(told) < 3000
    assert refused > len(seeds) / 3


@pytest.mark.parametrize("seed", [0, 3])
def test_the_check_goes_on_behind_a_damaged_line(tmp_path: Path, whole: dict[str, bytes], seed: int) -> None:
    for name in ("clip.mp4", "tone.wav"):
        (tmp_path / name).write_bytes(whole[name])
    path = tmp_path / "m.jsonl"
    content = damaged_manifest(seed)
    path.write_bytes(content + b"\n[]\n")
    assert check_data.main([str(path), "--workers", "0"]) == 1
    samples = rows(tmp_path / "m.jsonl.check" / "samples.jsonl")
    assert len(samples) == len(Manifest(path))
    assert "a JSON object is needed" in samples[-1]["problem"]["reason"]
