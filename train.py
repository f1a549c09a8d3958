"""Train a token compressor.

    deepspeed --num_gpus 2 train.py --config recipes/quickstart.yaml train.lr=1e-3
    torchrun --nproc_per_node 2 train.py --config recipes/quickstart.yaml
    python train.py --config recipes/quickstart.yaml

The last is a single process. Without GPUs the processes run on the CPU. With `--dry-run` one step is done, nothing is
saved, and what the run will need is printed: tokens, and the memory of a rank by number of ranks. `--help` lists every
key and method, `--help METHOD` the fields of one.
"""

from __future__ import annotations

import os
import sys
import traceback

from omnisieve.config import ConfigError, TrainConfig, load_config
from omnisieve.method_help import describe_methods

DRY_RUN = "--dry-run"


def main() -> int:
    """Build, train, close; returns the exit status."""
    try:
        arguments = [word for word in sys.argv[1:] if word != DRY_RUN]
        config = load_config(TrainConfig, arguments, description=__doc__, method_help=describe_methods)
    except ConfigError as error:
        return fail(error)
    # Imported only now, so that help and mistakes in the configuration show at once.
    from omnisieve.training import USER_ERRORS, build_trainer, check_run, connect, leave, rehearse, summary
    from omnisieve.training.memory import memory

    try:
        tell(f"checking {config.model.path} and the data")
        for remark in check_run(config):
            tell(remark)
        ranks = connect()
        before = memory(ranks.device)["process"]
        trainer = build_trainer(config, ranks)
        if DRY_RUN in sys.argv:
            text = rehearse(trainer, config, before)
        else:
            trainer.fit()
            text = summary(config)
        if ranks.is_first:
            print(text)
    except USER_ERRORS as error:
        leave(fail(error))
    except Exception:
        traceback.print_exc()
        leave(1)
    leave(0)


def tell(text: str) -> None:
    """Say it once, before processes know each other."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def fail(error: Exception) -> int:
    """Say what is wrong; every rank does, because a launcher ends the others as soon as one is gone."""
    rank = int(os.environ.get("RANK", "0"))
    print(f"train.py: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
