"""Compare compression methods at equal budgets on one manifest.

    python eval.py --config recipes/eval_testbed.yaml methods='[full,random,DIR]' ratios='[0.25]' output_dir=OUT

`methods` takes names of methods, folders of exported compressors, and names of settings in the recipe; Python files
in `plugins` register methods of your own. Writes `report.json`, `report.md`, `predictions.jsonl` and the resolved
`eval.yaml` to OUT, and prints the table. `--help` lists every key and method, `--help METHOD` the
fields of one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omnisieve.config import ConfigError, EvalConfig, load_config, save_config
from omnisieve.method_help import describe_methods


def main() -> int:
    """Evaluate, write, print; returns the exit status."""
    try:
        config = load_config(EvalConfig, sys.argv[1:], description=__doc__, method_help=describe_methods)
    except ConfigError as error:
        return fail(error)
    # Imported only now, so that help and mistakes in the configuration show at once.
    from omnisieve.evaluation.evaluate import USER_ERRORS, evaluate
    from omnisieve.evaluation.report import (
        CONFIG,
        EvaluationError,
        check_answered,
        check_folder,
        markdown,
        write_report,
    )

    try:
        check_folder(config.output_dir)
        # Now, not after hours of work: the folder must be writable.
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        save_config(config, Path(config.output_dir) / CONFIG)
    except (OSError, EvaluationError) as error:
        return fail(error)
    try:
        report, cells = evaluate(config)
        write_report(report, cells, config.output_dir)
        print(markdown(report), end="")
        check_answered(report, cells)
    except USER_ERRORS as error:
        return fail(error)
    return 0


def fail(error: Exception) -> int:
    """Say what is wrong."""
    print(f"eval.py: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
