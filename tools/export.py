"""Copies the compressor of a training run to a folder of its own, ready to be shared or loaded.

    python tools/export.py RUN OUT [--which best|last]

`best` is the compressor with the lowest validation loss, `last` the one of the last step. OUT holds safetensors, a
JSON configuration and a model card; `omnisieve.load_compressor(OUT)` loads it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from omnisieve.artifact import (
    KEPT_OF_A_RUN,
    ArtifactError,
    is_artifact,
    load_compressor,
    read_config,
    save_compressor,
)


def main(argv: list[str]) -> int:
    """Export and say what was exported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a training run (its output_dir)")
    parser.add_argument("out", type=Path, help="folder to write; an exported compressor there is replaced")
    parser.add_argument("--which", choices=KEPT_OF_A_RUN, help="the best one, or the last where nothing was validated")
    args = parser.parse_args(argv)
    source = find(args.run, args.which)
    card = read_config(source)["provenance"] | {"kept from the run": source.name}
    save_compressor(load_compressor(source), args.out, card=card)
    print(f"{source} -> {args.out}")
    return 0


def find(run: Path, which: str | None) -> Path:
    """The folder within a run to export.

    Raises:
        ArtifactError: the run does not hold it.
    """
    found = [name for name in KEPT_OF_A_RUN if is_artifact(run / name)]
    if not found:
        raise ArtifactError(
            f"{run} holds neither {run / 'best'} nor {run / 'last'}: give the output_dir of a training run"
        )
    if which is not None and which not in found:
        raise ArtifactError(f"{run} holds no {which} compressor, only {found[0]}: run again with --which {found[0]}")
    return run / (which or found[0])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ArtifactError as error:
        sys.exit(f"export.py: {error}")
