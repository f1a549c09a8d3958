"""Compares compression methods at equal budgets on one manifest.

    python eval.py --config recipes/eval_testbed.yaml methods='[full,random,DIR]' ratios='[0.25]' output_dir=OUT

`methods` takes names, folders of exported compressors, and names of settings in the recipe. Writes `report.json`,
`report.md`, `predictions.jsonl` and the resolved configuration, and prints the table.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omnisieve.backbones import BackboneError
from omnisieve.compressors import CompressorError
from omnisieve.config import ConfigError, EvalConfig, load_config, save_config
from omnisieve.data.feature_cache import FeatureCacheError
from omnisieve.data.manifest import ManifestError
from omnisieve.evaluation.evaluate import evaluate
from omnisieve.evaluation.report import markdown, write_report


def main(argv: list[str]) -> None:
    """Evaluate, write, print."""
    config = load_config(EvalConfig, argv)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "eval.yaml")
    report, cells = evaluate(config)
    write_report(report, cells, folder)
    print(markdown(report), end="")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (BackboneError, CompressorError, ConfigError, FeatureCacheError, ManifestError) as error:
        sys.exit(str(error))
