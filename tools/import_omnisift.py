"""Imports the compressor of a published OmniSIFT checkpoint.

    python tools/import_omnisift.py CHECKPOINT OUT [--preset omnisift/7b/25]

CHECKPOINT is a folder of safetensors shards with model.safetensors.index.json, one .safetensors file, or a state dict
in a .bin, .pt or .pth file. Only the tensors thinker.compressor.* are read; the LLM that was trained with them stays
where it is. OUT is an exported compressor that selects what the published code selects: its `chunks` are pairs of
grids, which the weights were trained on, and not windows of 2 s.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from omnisieve.artifact import save_compressor
from omnisieve.compressors import CompressorError, find_preset, list_presets
from omnisieve.published import OMNISIFT_PRESET, import_omnisift


def main(argv: list[str]) -> int:
    """Import, and say what was imported and what was not."""
    presets = [name for name in list_presets() if "omnisift" in find_preset(name).methods]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder or file")
    parser.add_argument("out", type=Path, help="folder to write; an exported compressor there is replaced")
    parser.add_argument(
        "--preset", choices=presets, default=OMNISIFT_PRESET, help="ratios of the export (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    compressor = import_omnisift(args.checkpoint, args.preset)
    save_compressor(compressor, args.out)
    count = sum(parameter.numel() for parameter in compressor.parameters())
    print(f"{args.checkpoint} -> {args.out}: {count:,} parameters at the ratios of {args.preset}")
    if "LLM" in compressor.provenance:
        print(f"LLM {compressor.provenance['LLM']}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CompressorError as error:
        sys.exit(f"import_omnisift.py: {error}")
