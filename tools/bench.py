"""Measure what parts of omnisieve cost, each beside what it replaces.

    python tools/bench.py towers [--hidden 8 16 32 64] [--repeats 5] [--out results/bench_towers.json]
    python tools/bench.py reading [--seconds 30] [--repeats 5] [--out results/bench_reading.json]

`towers`: both encoders of Qwen2.5-Omni, random weights of the released geometry (layers, windows, patches) at tiny
widths, on one clip with sound: the stock SDPA loop beside batched attention. What is saved belongs to each call; what
both do alike grows with the width, so on a CPU the ratio falls with it.

`reading`: frames of a 720p H.264 clip at 2 fps, with and without B-frames, in the decoding process's own code: by time
stamps beside decord 0.6, which goes by counting, both behind the same look at the file's packets and on one decoding
thread. And what counting costs: in how many files with random damage a legible frame is another one.

Both sides run in turns in one process, after one run of each that counts calls; seconds are medians, the ratio is the
median over neighbouring runs. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import decord
import numpy as np
import torch
import transformers
from torch.nn import functional as F
from transformers import Qwen2_5OmniThinkerConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder, Qwen2_5OmniVisionEncoder

import omnisieve
from omnisieve.backbones.tower_attention import BATCHED_SDPA
from omnisieve.data import _decoder

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # frames that tell their number are made by what the tests make theirs with

from tests.data.numbered_media import CASES, number_of, write  # noqa: E402

LAYERS = 32
FULL_ATTENTION = (7, 15, 23, 31)
"""Vision layers that attend to the whole frame, as released."""
FRAMES_PER_SECOND = 2
MEL_BINS, MEL_PER_SECOND = 128, 100
IMPLEMENTATIONS = {"stock": "sdpa", "batched": BATCHED_SDPA}


def main(argv: Sequence[str]) -> int:
    """Run one benchmark, print its result and write it."""
    arguments = parse(argv)
    result = arguments.run(arguments)
    report = {"benchmark": arguments.name, **result, "environment": environment()}
    text = json.dumps(report, indent=1)
    print(text)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of one benchmark; `run` is its function."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True)
    towers = add_benchmark(commands, "towers", bench_towers, "stock attention of the encoders beside batched")
    towers.add_argument("--seconds", type=int, default=60, help="length of the clip")
    towers.add_argument(
        "--grid", type=int, nargs=2, default=(26, 46), help="patches of a frame: rows and columns, even"
    )
    towers.add_argument("--layers", type=int, default=LAYERS, help="of each tower")
    towers.add_argument("--hidden", type=int, nargs="+", default=(8, 16, 32, 64), help="widths of the towers; one head")
    reading = add_benchmark(commands, "reading", bench_reading, "frames by time stamps beside decord")
    reading.add_argument("--seconds", type=int, default=30, help="length of the clip")
    reading.add_argument("--size", type=int, nargs=2, default=(1280, 720), help="width and height of a frame")
    reading.add_argument("--damaged", type=int, default=100, help="files with random damage")
    return parser.parse_args(argv)


def add_benchmark(
    commands: Any, name: str, run: Callable[[argparse.Namespace], dict[str, Any]], description: str
) -> argparse.ArgumentParser:
    """A subcommand with the options that every benchmark has."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(run=run)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / f"bench_{name}.json", help="file to write")
    return parser


def environment() -> dict[str, Any]:
    """What a reader must know to repeat the numbers."""
    return {
        "omnisieve": omnisieve.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
    }


def cpu_model() -> str:
    """As Linux names it; elsewhere the architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def in_turns(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run of each side; sides take turns, so that a busy machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


@contextmanager
def attention_calls() -> Iterator[list[int]]:
    """Lengths of the sequences that the SDPA kernel is called with inside."""
    seen: list[int] = []
    kernel = F.scaled_dot_product_attention

    def count(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(query.shape[2])
        return kernel(query, *args, **kwargs)

    with patch.object(F, "scaled_dot_product_attention", count):
        yield seen


@torch.no_grad()
def bench_towers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Encode one clip with both towers of each width, attention by the stock loop and in batches."""
    return {
        "clip": {"seconds": arguments.seconds, "fps": FRAMES_PER_SECOND, "patches_per_frame": list(arguments.grid)},
        "layers": arguments.layers,
        "widths": [bench_width(hidden, arguments) for hidden in arguments.hidden],
    }


def bench_width(hidden: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Calls, seconds and the median ratio of neighbouring runs, of towers of one width."""
    towers = Towers(hidden, arguments)
    sides = {name: partial(towers.encode, chosen) for name, chosen in IMPLEMENTATIONS.items()}
    calls, outputs = {}, {}
    for name, run in sides.items():
        with attention_calls() as seen:
            outputs[name] = run()
        calls[name] = len(seen)
    runs = in_turns(sides, arguments.repeats)
    pairs = zip(outputs["stock"], outputs["batched"], strict=True)
    return {
        "hidden": hidden,
        "calls": calls,
        "seconds": {name: round(statistics.median(values), 3) for name, values in runs.items()},
        "ratio": round(statistics.median(s / b for s, b in zip(runs["stock"], runs["batched"], strict=True)), 2),
        "runs": {name: [round(value, 3) for value in values] for name, values in runs.items()},
        "largest_difference": max(float((stock - batched).abs().max()) for stock, batched in pairs),
    }


class Towers:
    """Random encoders of Qwen2.5-Omni's geometry and one clip."""

    def __init__(self, hidden: int, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        config = Qwen2_5OmniThinkerConfig(
            vision_config={
                "hidden_size": hidden,
                "intermediate_size": hidden,
                "num_heads": 1,
                "depth": arguments.layers,
                "out_hidden_size": hidden,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "window_size": 112,
                "fullatt_block_indexes": list(FULL_ATTENTION),
            },
            audio_config={
                "d_model": hidden,
                "encoder_layers": arguments.layers,
                "encoder_attention_heads": 1,
                "encoder_ffn_dim": hidden,
                "output_dim": hidden,
                "num_mel_bins": MEL_BINS,
                "n_window": 100,
            },
        )
        self.visual = Qwen2_5OmniVisionEncoder._from_config(config.vision_config).eval()
        self.audio = Qwen2_5OmniAudioEncoder._from_config(config.audio_config).eval()
        # Two raw frames make one temporal step.
        self._grid = torch.tensor([[arguments.seconds * FRAMES_PER_SECOND // 2, *arguments.grid]])
        self._pixels = torch.randn(int(self._grid.prod()), 3 * 2 * 14**2)
        self._mel = torch.randn(MEL_BINS, arguments.seconds * MEL_PER_SECOND)

    def encode(self, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Video and audio features."""
        for tower in (self.visual, self.audio):
            tower.config._attn_implementation = implementation
        video = self.visual(self._pixels, grid_thw=self._grid).pooler_output
        audio = self.audio(self._mel, feature_lens=torch.tensor([self._mel.shape[1]])).last_hidden_state
        return video, audio


def bench_reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read a healthy clip both ways, then damaged ones."""
    with tempfile.TemporaryDirectory() as scratch:
        return {
            "clip": {"seconds": arguments.seconds, "size": list(arguments.size), "fps": 30, "read_fps": 2},
            "decord": decord.__version__,
            "clips": [bench_clip(Path(scratch) / "clip.mp4", b_frames, arguments) for b_frames in (0, 3)],
            "damaged": {"files": arguments.damaged, **count_wrong(Path(scratch), arguments.damaged)},
        }


def bench_clip(path: Path, b_frames: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and the median ratio of neighbouring runs for one clip; frames are equal to the bit."""
    write_noise(path, b_frames, arguments)
    sides = {"decord": partial(read, path, by_counting), "time stamps": partial(read, path, None)}
    outputs = [run() for run in sides.values()]
    runs = in_turns(sides, arguments.repeats)
    pairs = zip(runs["time stamps"], runs["decord"], strict=True)
    return {
        "b_frames": b_frames,
        "frames": len(outputs[0]),
        "equal": bool(np.array_equal(*outputs)),
        "seconds": {name: round(statistics.median(values), 3) for name, values in runs.items()},
        "ratio": round(statistics.median(ours / theirs for ours, theirs in pairs), 2),
        "runs": {name: [round(value, 3) for value in values] for name, values in runs.items()},
    }


def write_noise(path: Path, b_frames: int, arguments: argparse.Namespace) -> None:
    """A clip that is as hard to decode as a recording: a moving picture under noise."""
    width, height = arguments.size
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 24, (8, height, width, 3), dtype=np.uint8)
    picture = np.add.outer(np.arange(height), np.arange(2 * width)).astype(np.uint8)[..., None] // 2
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "bf": str(b_frames)}
        for number in range(arguments.seconds * 30):
            shift = 2 * number % width
            pixels = picture[:, shift : shift + width] + noise[number % len(noise)]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def read(path: Path, backend: Callable[..., np.ndarray] | None) -> np.ndarray:
    """Frames [F, H, W, 3] at 2 fps, as the decoding process reads them, or by another `backend`."""
    request = {"path": str(path), "video": True, "track": None, "max_seconds": None, **_EVERY_HALF_SECOND}
    with patch.object(_decoder, "_from_keys", backend or _decoder._from_keys):
        return _decoder.decode(request)[1][0]


_EVERY_HALF_SECOND = {"placement": "steps", "fps": 2.0, "min_frames": 1, "max_frames": None}


def by_counting(path: str, index: int, scan: _decoder.Scan, picks: np.ndarray) -> np.ndarray:
    """The same frames by decord."""
    return decord.VideoReader(path, num_threads=1).get_batch(picks).asnumpy()


def count_wrong(folder: Path, files: int) -> dict[str, int]:
    """In how many damaged files some frame is legibly another one than decoding from the start gives."""
    whole = write(folder, next(case for case in CASES if case.name == "straight.mp4")).read_bytes()
    numbers = [number_of(frame) for frame in read(folder / "straight.mp4", None)]
    path, chance = folder / "damaged.mp4", random.Random(0)
    wrong = {"read": 0, "wrong by decord": 0, "wrong by time stamps": 0}
    for _ in range(files):
        content = bytearray(whole)
        place = chance.randrange(whole.find(b"mdat") + 8, len(whole) - 40)
        content[place : place + 40] = bytes(40)
        path.write_bytes(content)
        try:
            truth = read(path, lambda *_: None)  # type: ignore[arg-type,return-value]
            found = {"wrong by decord": read(path, by_counting), "wrong by time stamps": read(path, None)}
        except (_decoder.Failure, decord.DECORDError):
            continue
        wrong["read"] += 1
        for name, frames in found.items():
            readings = zip(map(number_of, truth), map(number_of, frames), numbers, strict=True)
            wrong[name] += any(right == known != read and read < 100 for right, read, known in readings)
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
