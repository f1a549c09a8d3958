"""`train.py` as users start it, on real clips and the shipped LLM."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from omnisieve.data.synthetic import manifest_text, write_clip
from omnisieve.training.checkpoint import verify
from tests.data.stock import save_qwen3

ROOT = Path(__file__).parents[2]
CLIPS = {"train": 4, "val": 3}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    (folder / "videos").mkdir()
    for split, count in CLIPS.items():
        for index in range(count):
            write_clip(("a", split, index, str(folder / "videos")))
        (folder / f"{split}.jsonl").write_text(manifest_text("a", split, count))
    return folder


def arguments(clips: Path, output_dir: Path, *overrides: str) -> list[str]:
    """Of a run of two steps that decodes and encodes its clips."""
    settings = {
        "data.train": clips / "train.jsonl",
        "data.val": clips / "val.jsonl",
        "data.feature_cache": "null",
        "data.workers": 0,
        "train.max_steps": 2,
        "train.micro_batch_size": 1,
        "output_dir": output_dir,
    }
    return ["--config", "recipes/quickstart.yaml", *(f"{k}={v}" for k, v in settings.items()), *overrides]


def start(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    places = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in places}
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    variables = {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str]:
    """Exit status and output; the process does not outlive the test."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


def train(*words: str) -> tuple[int, str]:
    return finish(start([sys.executable, "train.py", *words]))


def start_two_ranks(*words: str) -> list[subprocess.Popen[str]]:
    """Both ranks without a launcher in between, so that each one's exit status is seen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [
        start([sys.executable, "train.py", *words], RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2", **address)
        for rank in "01"
    ]


def two_ranks(*words: str) -> list[tuple[int, str]]:
    return [finish(rank) for rank in start_two_ranks(*words)]


def wait_for_first_step(output_dir: Path, *processes: subprocess.Popen[str], timeout: float = 300) -> None:
    log, end = output_dir / "metrics.jsonl", time.monotonic() + timeout
    while not (log.exists() and log.read_text()) and time.monotonic() < end:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)


def last_checkpoint(output_dir: Path) -> int:
    """Its step, when it is whole."""
    name = (output_dir / "checkpoints" / "latest").read_text().strip()
    verify(output_dir / "checkpoints" / name)
    return int(name.removeprefix("checkpoint-"))


def assert_complete(output_dir: Path, steps: int) -> None:
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == steps
    assert "val/loss" in records[-1]
    for name in ("last", "best"):
        assert load_file(output_dir / name / "compressor.safetensors")


def test_a_single_process_needs_no_launcher(clips: Path, tmp_path: Path):
    status, output = train(*arguments(clips, tmp_path / "run"))
    assert status == 0, output
    assert_complete(tmp_path / "run", 2)


@pytest.mark.slow
def test_qwen3_from_a_feature_cache(clips: Path, tmp_path: Path):
    backbone, cache = save_qwen3(tmp_path / "qwen3"), tmp_path / "cache"
    overrides = (f"model.path={backbone}", f"data.feature_cache={cache}", "train.distill_weight=0.5")
    words = arguments(clips, tmp_path / "run", *overrides)
    status, output = finish(start([sys.executable, "tools/cache_features.py", *words]))
    assert status == 0, output
    status, output = train(*words)
    assert status == 0, output
    assert_complete(tmp_path / "run", 2)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.learning_rate=1", "unknown key 'train.learning_rate'"),
        ("train.resume=nowhere", "nowhere is no checkpoint"),
        ("output_dir=/dev/null/run", "cannot write the configuration to /dev/null/run/config.yaml: Not a directory"),
    ],
)
def test_mistakes_end_with_one_message(clips: Path, tmp_path: Path, override: str, told: str):
    status, output = train(*arguments(clips, tmp_path / "run", override))
    assert status == 1
    (message,) = (line for line in output.splitlines() if line.startswith("train.py: "))
    assert told in message
    assert "Traceback" not in output


def test_help_names_every_key_without_a_configuration():
    status, output = train("--help")
    assert status == 0
    assert "train.estimator.route" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [("deepspeed.launcher.runner", "--num_gpus", "2"), ("torch.distributed.run", "--nproc_per_node", "2")],
    ids=["deepspeed", "torchrun"],
)
def test_launchers(clips: Path, tmp_path: Path, launcher: tuple[str, ...]):
    command = [sys.executable, "-m", *launcher, "train.py", *arguments(clips, tmp_path / "run")]
    status, output = finish(start(command))
    assert status == 0, output
    assert_complete(tmp_path / "run", 2)


ENDLESS = ("train.max_steps=1000", "train.log_every=1", "train.eval_every=0", "train.save_every=0")


def test_sigterm_to_one_of_two_ranks_ends_both_well(clips: Path, tmp_path: Path):
    ranks = start_two_ranks(*arguments(clips, tmp_path / "run", *ENDLESS))
    wait_for_first_step(tmp_path / "run", *ranks)
    ranks[1].send_signal(signal.SIGTERM)
    for status, output in map(finish, ranks):
        assert status == 0, output
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert last_checkpoint(tmp_path / "run") == steps[-1] < 1000


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_signal_to_the_launcher_leaves_a_checkpoint(clips: Path, tmp_path: Path, launcher: str, number: int):
    """It signals the ranks' decoding workers, too, whose samples the last step needs."""
    if launcher == "torchrun":
        command = ["torch.distributed.run", "--nproc_per_node", "2"]
    else:
        world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
        command = ["deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=127.0.0.1"]
    words = arguments(clips, tmp_path / "run", *ENDLESS, "data.workers=1")
    process = start([sys.executable, "-m", *command, "train.py", *words])
    wait_for_first_step(tmp_path / "run", process)
    process.send_signal(number)
    _, output = finish(process)
    assert "ended on request" in output, output
    assert last_checkpoint(tmp_path / "run") < 1000
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()


@pytest.mark.slow
def test_25_and_25_steps_are_50(clips: Path, tmp_path: Path):
    options = ("train.max_steps=50", "train.eval_every=25", "train.estimator.candidates=0.5")
    for folder, *more in (("whole",), ("parts", "train.stop_at=25"), ("parts",)):
        for status, output in two_ranks(*arguments(clips, tmp_path / folder, *options, *more)):
            assert status == 0, output
    whole, parts = (load_file(tmp_path / folder / "last" / "compressor.safetensors") for folder in ("whole", "parts"))
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) == 0


@pytest.mark.slow
def test_60_of_60_runs_end_well(clips: Path, tmp_path: Path):
    """Library threads abort now and then at exit; a run that did its work must still exit with 0."""
    ends = []
    for number in range(60):
        options = ("train.eval_every=0", "train.save_every=0")
        ends += two_ranks(*arguments(clips, tmp_path / str(number), *options))
    bad = [output[-2000:] for status, output in ends if status != 0]
    assert not bad, f"{len(bad)} of {len(ends)} processes: {bad[0]}"
    assert len(ends) == 120
