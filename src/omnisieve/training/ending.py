"""What a run says at its end: what it left, and what to do with it."""

from __future__ import annotations

from pathlib import Path

from omnisieve.artifact import is_artifact, read_config
from omnisieve.config import TrainConfig
from omnisieve.training.checkpoint import BEST, LAST


def summary(config: TrainConfig) -> str:
    """The best step, the folder, and the next commands."""
    run, steps = Path(config.output_dir), config.train.max_steps
    if not is_artifact(run / LAST):
        return f"Ended before the first step; {run} holds no compressor."
    last = read_config(run / LAST)["provenance"]["steps"]
    left = f"Not validated; {run / LAST} holds step {last} of {steps}."
    if is_artifact(run / BEST):
        card = read_config(run / BEST)["provenance"]
        left = f"Best step {card['steps']} of {last}, validation loss {card['validation loss']:.4f}: {run / BEST}"
    lines = [left]
    if last < steps:
        without = " without train.stop_at" if config.train.stop_at is not None else ""
        lines.append(f"The run has {steps - last} steps left; the same command{without} goes on.")
    return "\n".join(
        [
            *lines,
            "",
            "What next:",
            f"  python tools/export.py {run} {run / 'export'}",
            f"  python eval.py --config recipes/EVAL.yaml model.path={config.model.path} manifest=TEST.jsonl "
            f"methods='[full,random,{run / 'export'}]' output_dir={run / 'eval'}",
            f"  tensorboard --logdir {run / 'tensorboard'}",
        ]
    )
