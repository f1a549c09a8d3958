"""Trains the testbed's backbone from nothing, on clips that no split of the testbed contains.

    python tools/train_testbed_backbone.py OUT [--scale 1.0] [--workers 2] [--seed 0]

1. Towers: dense clips (an event or a card in every second cell), written as mp4 and decoded; each token's output is
   pulled to a mix of concept vectors, those of words being also the first word embeddings.
2. Features: clips of the `backbone` split through the frozen towers, once.
3. Language model: answers from kept media tokens, from few to all of them, with dense heads on inner states.
4. The weights are rounded to bf16, measured on the val split, and saved with processor and configuration.

`OUT/training_log.jsonl` gets one line per 25 steps. `--scale 0.01` is a smoke test of the whole chain.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from omnisieve.data.synthetic import draw_questions, make_clip
from testbed_backbone.features import encoder_inputs, tower_features
from testbed_backbone.language import Heads, Phase, evaluate, train_language_model
from testbed_backbone.model import build_model, build_processor, build_tokenizer, concept_vectors, embed_words
from testbed_backbone.packing import Packer, Record, draw_tokens, make_record
from testbed_backbone.targets import concept_names, dense_picture, dense_sound
from testbed_backbone.towers import dense_example, soften, tower_accuracy, train_towers

LAYERS = 8
HEAD_DEPTHS = (3, 5)
"""Layers after which the dense heads read media tokens, and the words of questions."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the code."""

    seed: int = 0
    dense_clips: tuple[int, int] = (360, 120)
    """Clips of domain a and b that the towers see."""
    tower_steps: int = 450
    clips: tuple[int, int] = (1440, 480)
    """Clips of domain a and b that the language model sees."""
    phases: tuple[Phase, ...] = (
        Phase(steps=500, batch=16, ratio=(0.08, 0.25), questions=9, lr=1.5e-3),
        Phase(steps=300, batch=16, ratio=(0.08, 0.5), questions=9, lr=1.5e-3),
        Phase(steps=300, batch=8, ratio=(0.15, 1.0), questions=9, lr=1.2e-3, final_lr=0.02, auxiliary=0.2),
    )


def main() -> None:
    """Parse the command line and run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for weights, processor and log")
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks every count and number of steps")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw and encode clips")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch while training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    train_backbone(scaled(Recipe(seed=args.seed), args.scale), args.out, args.workers)


def scaled(recipe: Recipe, scale: float) -> Recipe:
    """Return the recipe with all counts and steps multiplied by `scale`."""
    if scale == 1:
        return recipe

    def count(n: int) -> int:
        return max(8, round(n * scale))

    return replace(
        recipe,
        dense_clips=tuple(count(n) for n in recipe.dense_clips),
        clips=tuple(count(n) for n in recipe.clips),
        tower_steps=count(recipe.tower_steps),
        phases=tuple(replace(phase, steps=count(phase.steps)) for phase in recipe.phases),
    )


def train_backbone(recipe: Recipe, out: Path, workers: int) -> None:
    """Run all stages and save the model to `out`."""
    torch.manual_seed(recipe.seed)
    start = time.time()
    with (out / "training_log.jsonl").open("w", encoding="utf-8") as file:

        def log(**entry: Any) -> None:
            entry["elapsed"] = round(time.time() - start, 1)
            file.write(json.dumps(entry) + "\n")
            file.flush()
            print(entry, flush=True)

        log(stage="recipe", hardware=f"{os.cpu_count()} CPU cores ({platform.machine()})", **asdict(recipe))
        tokenizer = build_tokenizer()
        concepts = concept_vectors(concept_names(), recipe.seed)
        model = build_model(tokenizer, LAYERS, recipe.seed)
        embed_words(model, tokenizer, concepts, recipe.seed)
        fit_towers(model, concepts, recipe, workers, log)
        towers = out / "towers.pt"
        torch.save(model.state_dict(), towers)
        records = cache_records(towers, recipe.clips, "backbone", workers)
        val = {d: cache_records(towers, n, "val", workers) for d, n in (("a", (48, 0)), ("b", (0, 48)))}
        towers.unlink()
        log(stage="features", clips=len(records))
        packer = Packer(tokenizer, model)
        heads = Heads(concepts)
        for i, phase in enumerate(recipe.phases):
            train_language_model(model, heads, packer, records, phase, log, recipe.seed + i, HEAD_DEPTHS)
            log(stage="validation", phase=i, **validate(model, packer, val))
            save(model, tokenizer, out)
        round_to_bf16(model)
        log(stage="rounded", **validate(model, packer, val))
        save(model, tokenizer, out)


def fit_towers(model: Any, concepts: dict[str, Any], recipe: Recipe, workers: int, log: Callable[..., None]) -> None:
    """Train the towers on dense clips and log their accuracy on 24 others."""
    jobs = [(d, i) for d, n in zip("ab", recipe.dense_clips, strict=True) for i in range(n)]
    held_out = [(d, 100_000 + i) for d in "ab" for i in range(12)]
    with ProcessPoolExecutor(workers) as pool:
        inputs = list(
            tqdm(pool.map(_dense_inputs, jobs + held_out, chunksize=8), total=len(jobs) + 24, desc="dense clips")
        )
    data = [
        dense_example(d, i, concepts, (torch.from_numpy(x), torch.from_numpy(y)))
        for (d, i), (x, y) in zip(jobs + held_out, inputs, strict=True)
    ]
    train_towers(model, data[: len(jobs)], concepts, recipe.tower_steps, 8, log)
    log(stage="towers", accuracy=tower_accuracy(model, data[len(jobs) :], concepts))
    soften(model, concepts)


def _dense_inputs(job: tuple[str, int]) -> tuple[np.ndarray, np.ndarray]:
    torch.set_num_threads(1)
    patches, mel = encoder_inputs(dense_picture(*job), dense_sound(*job))
    return patches.numpy(), mel.numpy()


def cache_records(towers: Path, clips: tuple[int, int], split: str, workers: int) -> list[Record]:
    """Return records of the first clips of both domains of a split; `val` clips carry their manifest's questions."""
    jobs = [(d, split, i) for d, n in zip("ab", clips, strict=True) for i in range(0, n, 8)]
    with ProcessPoolExecutor(workers, initializer=_load_towers, initargs=(towers,)) as pool:
        chunks = list(tqdm(pool.map(_records, jobs), total=len(jobs), desc=f"features ({split})"))
    records = [record for chunk in chunks for record in chunk]
    for record in records:
        record.features = torch.from_numpy(record.features)
    return records


_WORKER: dict[str, Any] = {}


def _load_towers(path: Path) -> None:
    torch.set_num_threads(1)
    _WORKER["model"] = build_model(build_tokenizer(), LAYERS, 0)
    _WORKER["model"].load_state_dict(torch.load(path, weights_only=True))


@torch.no_grad()
def _records(job: tuple[str, str, int]) -> list[Record]:
    domain, split, first = job
    clips = [make_clip(domain, split, first + i) for i in range(8)]
    inputs = [encoder_inputs(clip, clip) for clip in clips]
    patches, mels = (torch.stack(part) for part in zip(*inputs, strict=True))
    video, audio = tower_features(_WORKER["model"], patches, mels)
    questions = [draw_questions(clip) if split != "backbone" else None for clip in clips]
    records = [make_record(*parts) for parts in zip(clips, video, audio, questions, strict=True)]
    for record in records:
        record.features = record.features.numpy()  # type: ignore[assignment]  # tensors would cross as file handles
    return records


def validate(model: Any, packer: Packer, val: dict[str, list[Record]]) -> dict[str, Any]:
    """Return accuracy on val clips of each domain, with all tokens and with 25 % (evidence and random others)."""
    result: dict[str, Any] = {}
    for domain, records in val.items():
        result[domain] = evaluate(model, packer, records)
        keeps = list(draw_tokens(records, 183, np.random.default_rng(0)))
        result[f"{domain} as conversation"] = evaluate(model, packer, records, conversation=True)["all"]
        result[f"{domain} at 25 %"] = evaluate(model, packer, records, keeps)["all"]
    return result


def round_to_bf16(model: Any) -> None:
    """Round all parameters to bf16 values, in place; the model goes on computing in fp32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write weights in bf16, configuration and processor. Only parameters are cast: rotary buffers are not stored."""
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.save_pretrained(out, state_dict=state)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "bfloat16"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / "model.safetensors").chmod(0o644)
    build_processor(tokenizer).save_pretrained(out)


if __name__ == "__main__":
    main()
