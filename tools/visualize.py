"""Draw what a compressor keeps of a clip: its frames with dropped tokens dimmed, its spectrogram with the kept spans.

    python tools/visualize.py --config recipes/quickstart.yaml --compressor runs/quickstart/export --clip 3 \
        --output clip.png
    python tools/visualize.py --config recipes/quickstart.yaml --compressor stvp --ratio 0.25 --clip 3 --output stvp.png

The clip is read from its file and goes through the recipe's model; nothing is generated. Any method that decides before
the LLM can be drawn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

from omnisieve.artifact import load_compressor
from omnisieve.backbones import Adapter, BackboneError, adapter_for, load_backbone
from omnisieve.backbones.media import media_loader
from omnisieve.compressors import Compressor, CompressorError
from omnisieve.compressors.inner import InnerCompressor
from omnisieve.config import ConfigError, EvalConfig, TrainConfig, read_config, read_yaml
from omnisieve.data.batch import Batch
from omnisieve.data.collate import collate
from omnisieve.data.errors import DataError
from omnisieve.data.manifest import Manifest
from omnisieve.evaluation.methods import resolve_methods
from omnisieve.training.pictures import asked_ratio, clip_media, picture

SUFFIXES = (".png", ".jpg", ".webp")


def main(argv: list[str]) -> int:
    """Load, plan, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a recipe of training or of evaluation: model, data, manifest")
    parser.add_argument("--compressor", required=True, help="folder of an exported compressor, or a method's name")
    parser.add_argument("--ratio", type=float, help="retained ratio; the exported compressor's own when left out")
    parser.add_argument("--manifest", help="instead of the recipe's: that of validation, or of evaluation")
    parser.add_argument("--clip", type=int, default=0, help="line of the manifest, from 0")
    parser.add_argument("--frames", type=int, default=6, help="at most so many of a video")
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    parser.add_argument("overrides", nargs="*", help="keys of the recipe, such as model.path=...")
    args = parser.parse_args(argv)
    if args.output.suffix not in SUFFIXES:
        parser.error(f"--output {args.output}: the picture's suffix must be one of {', '.join(SUFFIXES)}")
    config = load_recipe(args.config, args.overrides)
    clips = Manifest(args.manifest or manifest_of(config))
    if not 0 <= args.clip < len(clips):
        raise DataError(f"--clip {args.clip}: {clips.path} has {len(clips)} clips, the first is 0")
    compressor = load(args.compressor, args.ratio)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = config.model
    adapter = adapter_for(
        load_backbone(model.path, model.dtype, model.attn_implementation, device, model.encoder_attn_implementation)
    )
    loader = media_loader(config.model.path, adapter, config.data, use_cache=False)
    sample = loader.sample(clips[args.clip], loader.load(clips[args.clip]))
    batch = collate(
        [sample],
        pad_token_id=loader.preprocessor.tokenizer.pad_token_id,
        ids_per_window=loader.preprocessor.rules.ids_per_chunk,
    ).to(device)
    keep = kept(adapter, compressor.to(device), batch)
    drawn = picture(
        clip_media(sample, loader.preprocessor, args.frames),
        keep.cpu().numpy()[0],
        f"{sample.id}, {args.compressor}, {asked_ratio(compressor.settings)}",
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(drawn).save(args.output)
    print(f"drawn: {args.output}")
    return 0


def load_recipe(path: str, overrides: list[str]) -> TrainConfig | EvalConfig:
    """The configuration; a recipe with `methods` is one of evaluation."""
    return read_config(EvalConfig if "methods" in read_yaml(path) else TrainConfig, path, overrides)


def manifest_of(config: TrainConfig | EvalConfig) -> str:
    """What the recipe looks at without learning from it, if there is such a split."""
    return config.manifest if isinstance(config, EvalConfig) else config.data.val or config.data.train


def load(name: str, ratio: float | None) -> Compressor:
    """An exported compressor, at its own ratio unless another is given, or a training-free method at a ratio.

    Raises:
        CompressorError: there is none of that name, it needs a ratio, or it decides inside the LLM.
    """
    (method,) = resolve_methods([name], {})
    if method.kind == "bound":
        raise CompressorError(f"{name} is a bound, which reads answers, and cannot be drawn")
    if ratio is not None or method.preset is not None:
        compressor = method.build(ratio or method.ratios([])[0])
    elif method.folder is not None:
        compressor = load_compressor(method.folder)
    else:
        raise CompressorError(f"{name} has no ratio of its own: give --ratio, such as --ratio 0.25")
    if isinstance(compressor, InnerCompressor):
        raise CompressorError(f"{name} prunes inside the LLM, layer by layer; draw a method that decides before it")
    return compressor


@torch.no_grad()
def kept(adapter: Adapter, compressor: Compressor, batch: Batch) -> torch.Tensor:
    """What stays of a batch, [B, S] bool."""
    features = adapter.encode(batch, compressor.needs)
    needs = adapter.needs(features, batch.layout, compressor.needs)
    return compressor.plan(adapter.merge(batch.input_ids, features), batch.layout, needs).keep


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (BackboneError, CompressorError, ConfigError, DataError) as error:
        sys.exit(f"visualize.py: {error}")
