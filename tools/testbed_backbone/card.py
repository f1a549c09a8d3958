"""Writes the backbone's card from the reference report and the training log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE = """# A tiny Qwen2.5-Omni for the synthetic testbed

A stock `Qwen2_5OmniThinkerForConditionalGeneration` with {parameters:.2f} M parameters (bf16, {megabytes:.1f} MB),
trained by the recipe of `python tools/train_testbed_backbone.py OUT` in {minutes:.0f} minutes{hardware}
(log: `training_log.jsonl`).
8 decoder layers of width 128 (4 heads, 2 key heads); vision tower of depth 2 and audio tower of 2 layers, width 64.
The shapes that token arithmetic depends on are those of the real model: patch 14, merge 2, temporal patch 2, 128
mel bins, 2-s windows, 25 position ids a second. A clip has 432 video and 299 audio tokens.

**What it is for.** It shows that the learning machinery works, and compares designs. Its distractors are salient by
design and never asked about, so the size of a gain on it says nothing about real videos. How isolated an event is
among its distractors was set by hand (`targets.py`, `towers.SOFTEN`), so that neither similarity nor diversity alone
finds the events. It knows 42 words, 18 kinds of question and nothing else. Its towers were taught with dense labels of
the synthetic world, and its word embeddings started where the towers' outputs were pulled to: it is not evidence for
how such models should be trained.

## Figures
Accuracy in percent on {clips} {split} clips per domain, every question asked alone. This page is written by
`python tools/testbed_reference.py`. Domain b was a quarter of the training clips.

| tokens | domain a ({questions_a} questions) | domain b ({questions_b}) |
|---|---|---|
{overall}

The audio half: video by the similarity pruner at 25 %, audio at 25 % chosen by

| audio chosen by | domain a | domain b |
|---|---|---|
{audio}

| family (domain a) | full | no media | random 25 % | oracle 25 % | oracle 15 % |
|---|---|---|---|---|---|
{families}
"""


def write_card(folder: Path, report: dict[str, Any]) -> None:
    """Write `folder/README.md`; needs `training_log.jsonl` and `model.safetensors` beside it."""
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    size = (folder / "model.safetensors").stat().st_size
    a, b = report["domains"]["a"], report["domains"]["b"]
    hardware = next((f" on {entry['hardware']}" for entry in log if "hardware" in entry), "")
    names = ("full", "full as conversation", "no media", "random 25 %", "oracle 25 %", "oracle 15 %")
    audio = "video by similarity at 25 %, audio by"
    text = TEMPLATE.format(
        parameters=size / 2e6,
        megabytes=size / 1e6,
        minutes=log[-1]["elapsed"] / 60,
        hardware=hardware,
        clips=report["clips"],
        split=report["split"],
        questions_a=a["questions"],
        questions_b=b["questions"],
        overall="\n".join(f"| {name} | {a[name]:.1f} | {b[name]:.1f} |" for name in names),
        audio="\n".join(f"| {name} | {a[audio][name]:.1f} | {b[audio][name]:.1f} |" for name in a[audio]),
        families="\n".join(
            f"| {family} | " + " | ".join(f"{value:.1f}" for value in row.values()) + " |"
            for family, row in a["families"].items()
        ),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
