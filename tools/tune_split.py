"""Finds how each method is best split between video and audio, on validation clips.

    python tools/tune_split.py --config recipes/eval_testbed.yaml manifest=runs/testbed/val.jsonl

Every method of the recipe whose split is free is evaluated at every ratio with the same total budget, split equally
and in the papers' proportion. Prints both accuracies and the `settings` to put into the recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import yaml

from omnisieve.config import ConfigError, EvalConfig, load_config
from omnisieve.evaluation.evaluate import USER_ERRORS, open_benchmark, run
from omnisieve.evaluation.methods import BY_RATIO, Method, resolve_methods
from omnisieve.evaluation.metrics import accuracy
from omnisieve.layout import Modality
from omnisieve.method_help import describe_methods

PROPORTIONS = {0.35: 65 / 30, 0.25: 55 / 20, 0.15: 45 / 10, 0.10: 35 / 6}
"""Kept share of audio / kept share of video, by total ratio, as SEATS sets them (table 7); others take the nearest."""


def main(argv: list[str]) -> int:
    """Evaluate both splits and print."""
    config = load_config(EvalConfig, argv, description=__doc__, method_help=describe_methods)
    model, benchmark = open_benchmark(config)
    tokens = benchmark[0].questions[0].tokens
    counts = [int((tokens.modality == m).sum()) for m in (Modality.VIDEO, Modality.AUDIO)]
    shares = {ratio: audio_share(ratio, *counts) for ratio in config.ratios}
    resolved = resolve_methods(config.entries, config.settings, config.plugins)
    free = [method for method in resolved if method.kind in ("training-free", "learned")]
    methods = [variant for method in free for variant in splits(method, shares)]
    found = {
        (cell.method, cell.retained_ratio): accuracy(cell.answers).value if cell.ok else 0.0
        for cell in run(config, model, benchmark, methods).cells
    }
    print(f"audio_ratio of the papers' proportion: {shares}\n\n| method | asked | equal | papers' |\n|---|---|---|---|")
    for method in free:
        for ratio in shares:
            equal, papers = (found[name, ratio] for name in names(method))
            print(f"| {method.label} | {ratio:.0%} | {equal:.1f} | {papers:.1f} |")
    print("\n" + yaml.safe_dump({"settings": best(free, shares, found)}, sort_keys=False), end="")
    return 0


def audio_share(ratio: float, video: int, audio: int) -> float:
    """Kept share of audio that the papers' proportion gives at the total `ratio`, for so many tokens."""
    proportion = PROPORTIONS[min(PROPORTIONS, key=lambda known: abs(known - ratio))]
    return round(min(proportion * ratio * (video + audio) / (video + proportion * audio), 1.0), 3)


def names(method: Method) -> tuple[str, str]:
    """Labels of a method's two splits."""
    return f"{method.label}, equal", f"{method.label}, papers"


def splits(method: Method, shares: Mapping[float, float]) -> list[Method]:
    """The method with both splits; splits that it already has are replaced."""
    plain = {key: value for key, value in method.settings.items() if key not in ("video_ratio", "audio_ratio")}
    source = str(method.folder) if method.folder is not None else method.name
    variants: dict[str, dict[str, Any]] = {name: {"method": source, **plain} for name in names(method)}
    if method.folder is not None:  # whose own split would stay at its own ratio
        variants[names(method)[0]][BY_RATIO] = {ratio: {"audio_ratio": ratio} for ratio in shares}
    variants[names(method)[1]][BY_RATIO] = {ratio: {"audio_ratio": share} for ratio, share in shares.items()}
    return resolve_methods(list(variants), variants)


def best(
    methods: list[Method], shares: Mapping[float, float], found: Mapping[tuple[str, float], float]
) -> dict[str, Any]:
    """Settings of the methods for which the papers' split is better somewhere."""
    settings: dict[str, Any] = {}
    for method in methods:
        equal, papers = names(method)
        better = {r: {"audio_ratio": share} for r, share in shares.items() if found[papers, r] > found[equal, r]}
        if better:
            settings[method.label] = {BY_RATIO: better}
    return settings


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ConfigError, *USER_ERRORS) as error:
        sys.exit(f"tune_split.py: {error}")
