"""Copies the compressor of a training run to a folder of its own, ready to be shared or loaded.

    python tools/export.py RUN OUT [--which best|last]
    python tools/export.py RUN OUT --merge [--backbone PATH] [--dtype float32|bfloat16]

`best` is the compressor with the lowest validation loss, `last` the one of the last step. OUT holds safetensors, a
JSON configuration and a model card; `omnisieve.load_compressor(OUT)` loads it. RUN may be an exported folder, too.

Where the LLM was trained with it (`train.llm.mode` lora or full), OUT/llm holds what training changed of it. With
--merge there is a stock model with its processor in OUT/model instead: the LLM with its adapters merged, or tuned as a
whole. It is read back and compared. Merging takes memory for one model, on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from omnisieve.artifact import (
    KEPT_OF_A_RUN,
    LLM_FOLDER,
    ArtifactError,
    is_artifact,
    load_compressor,
    locate,
    read_config,
    save_compressor,
)
from omnisieve.compressors import CompressorError

MODEL_FOLDER = "model"
MODEL_FILES = tuple(
    f"{MODEL_FOLDER}/{name}"
    for name in (
        "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "*processor_config.json",
        "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
        "chat_template.*",
    )
)  # fmt: skip
"""What transformers writes of a model and its processor."""


def main(argv: list[str]) -> int:
    """Export and say what was exported.

    Raises:
        ArtifactError: there is nothing to export, the LLM of the training is not there, or what was written reads
            back differently.
    """
    args = parse(argv)
    source = find(locate(args.run), args.which)
    card = read_config(source)["provenance"] | {"kept from the run": source.name}
    if args.merge:
        export_merged(source, args.out, card, args.backbone, args.dtype)
    else:
        export_apart(source, args.out, card)
    for path in sorted(path for path in args.out.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size / 1e6:12,.2f} MB  {path}")
    print(f"{source} -> {args.out}")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", help="folder of a training run (its output_dir), or an export: a folder, or OWNER/NAME on the hub"
    )
    parser.add_argument("out", type=Path, help="folder to write; an export there is replaced, other files stay")
    parser.add_argument("--which", choices=KEPT_OF_A_RUN, help="the best one, or the last where nothing was validated")
    parser.add_argument("--merge", action="store_true", help="write the tuned LLM as a model of its own, OUT/model")
    parser.add_argument("--backbone", help="with --merge: the LLM of the training, where it is not in its old place")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="with --merge: of OUT/model; as the LLM is stored unless given. bfloat16 rounds merged weights",
    )
    args = parser.parse_args(argv)
    if (args.backbone or args.dtype) and not args.merge:
        parser.error("--backbone and --dtype are for --merge")
    return args


def find(run: Path, which: str | None) -> Path:
    """The folder within a run to export; an export is its own.

    Raises:
        ArtifactError: the run does not hold it.
    """
    if is_artifact(run) and which is None:
        return run
    found = [name for name in KEPT_OF_A_RUN if is_artifact(run / name)]
    if not found:
        raise ArtifactError(
            f"{run} holds neither {run / 'best'} nor {run / 'last'}: give the output_dir of a training run"
        )
    if which is not None and which not in found:
        raise ArtifactError(f"{run} holds no {which} compressor, only {found[0]}: run again with --which {found[0]}")
    return run / (which or found[0])


def export_apart(source: Path, out: Path, card: dict[str, Any]) -> None:
    """Copy an export, with what it holds of its LLM.

    Raises:
        ArtifactError: it is damaged, or cannot be written.
    """
    if (source / LLM_FOLDER).is_dir():
        # Imported only now, because it takes seconds. What is damaged is not passed on.
        from omnisieve.trained_llm import read_tuned_llm

        read_tuned_llm(source)
    save_compressor(load_compressor(source), out, card=card)


def export_merged(source: Path, out: Path, card: dict[str, Any], backbone: str | None, dtype: Any) -> None:
    """Write a compressor, and its tuned LLM as a stock model: both or nothing.

    Raises:
        ArtifactError: the LLM was frozen, what is known of it is damaged, the LLM that it was made from is not there
            or another one, or what was written reads back differently.
    """
    from omnisieve.backbones import BackboneError
    from omnisieve.backbones.loading import find_model
    from omnisieve.trained_llm import read_tuned_llm, save_tuned_model

    tuned = read_tuned_llm(source)
    base = backbone or tuned.base
    merged = "with its adapters merged" if tuned.mode == "lora" else "tuned as a whole"
    try:
        find_model(base)
    except BackboneError as error:
        raise ArtifactError(f"the LLM of the training: {error}; say where it is with --backbone PATH") from error
    try:
        save_compressor(
            load_compressor(source),
            out,
            card=card | {"LLM": f"{base} {merged}, in the folder {MODEL_FOLDER}"},
            also=lambda folder: save_tuned_model(source, folder / MODEL_FOLDER, base, dtype, note=say),
            owned=MODEL_FILES,
        )
    except BackboneError as error:
        raise ArtifactError(str(error)) from error


def say(text: str) -> None:
    """Tell at once what is being done."""
    print(f"{text} ...", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (CompressorError, OSError) as error:
        sys.exit(f"export.py: {error}")
