"""Run one training step of a recipe on a released model's shapes, without weights, memory or a GPU.

    python tools/dry_run.py --config recipes/omnisift_qwen2_5_omni_7b.yaml --shapes qwen2_5_omni_7b --seconds 60

Everything lives on the `meta` device: shapes and dtypes are real, numbers are not. What passes here fits together:
token layout, compressor, hooks, stock decoder, answer rows, loss and backward pass. Printed are the sizes it met
and the memory that a rank will need.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import numpy as np
import torch

from omnisieve.backbones import Adapter, BackboneError, Estimator, adapter_for
from omnisieve.backbones.families import family_of
from omnisieve.backbones.protocols import protocol_of
from omnisieve.backbones.reference import SHAPES, cache_bytes, reference_config
from omnisieve.compressors import CompressorError
from omnisieve.config import ConfigError, TrainConfig, WarmStartSection, read_config
from omnisieve.data.batch import Batch, Features
from omnisieve.data.tokens import VideoRun, expand
from omnisieve.layout import Modality, TokenLayout
from omnisieve.training.build import make_compressor, make_trainable
from omnisieve.training.deepspeed_settings import trains_in_bfloat16
from omnisieve.training.estimate import sizes_of, table
from omnisieve.training.objective import TrainingModule
from omnisieve.training.rehearsal import RANKS

TEXT_ID, TEXT_TOKENS, ANSWER_TOKENS = 0, 60, 40
MEL_FRAMES_PER_SECOND = 100
BYTES_IN_FLOAT32, BYTES_IN_BFLOAT16 = 16, 14
"""What a checkpoint holds of a trainable parameter: itself, what the optimiser updates, and two moments."""


def main(argv: list[str]) -> int:
    """Build, run one step, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a training recipe")
    parser.add_argument("--shapes", required=True, choices=SHAPES, help="of a released model")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the clip, with sound, 16:9")
    parser.add_argument("--device-gib", type=float, default=80.0, help="memory of a GPU that the run is meant for")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.llm.mode=lora")
    args = parser.parse_args(argv)
    config = read_config(TrainConfig, args.config, args.overrides)
    shapes = reference_config(args.shapes)
    family = family_of(shapes.model_type)
    assert family is not None, "there are shapes of supported families only"
    torch.set_default_dtype(getattr(torch, config.model.dtype))
    with torch.device("meta"):
        backbone = family.thinker(shapes)
    torch.set_default_dtype(torch.float32)
    backbone.eval().requires_grad_(False)
    width = adapter_for(backbone).hidden_size
    train = config.train
    # Where it starts from changes no shape.
    fresh = replace(config, train=replace(train, init_from=None, warm_start=WarmStartSection()))
    with torch.device("meta"):
        compressor = make_compressor(fresh, width)
        make_trainable(adapter_for(backbone), train.llm)
    if trains_in_bfloat16(config):
        compressor.to(torch.bfloat16)
    module = TrainingModule(
        backbone,
        compressor,
        estimator=Estimator(train.estimator.route, train.estimator.candidates),
        distill_weight=train.distill_weight,
        gradient_checkpointing=train.gradient_checkpointing,
    ).train()
    batch = clip(adapter_for(backbone), config, args.seconds)
    with module.attached():
        loss = module(batch)["loss"]
        loss.backward()
    for line in (
        *summary(module, batch),
        *on_disk(module, config, args.shapes),
        "",
        *memory(module, batch, config, args.device_gib),
    ):
        print(line)
    return 0


def clip(adapter: Adapter, config: TrainConfig, seconds: float) -> Batch:
    """`micro_batch_size` equal clips with cached features, as the data side would hand them over."""
    rules = adapter.token_rules()
    protocol = protocol_of(config.data, adapter.thinker.config)
    wanted = max(int(seconds * protocol.fps), protocol.min_frames)
    frames = wanted if protocol.max_frames is None else min(wanted, protocol.max_frames)
    grids = frames // rules.temporal_patch_size
    side = adapter.visual.config.patch_size * rules.spatial_merge_size
    per_side = protocol.frame_pixels(frames) / side**2 / (16 * 9)
    rows, columns = int(9 * per_side**0.5), int(16 * per_side**0.5)
    patches = (grids, rows * rules.spatial_merge_size, columns * rules.spatial_merge_size)
    mel = int(min(seconds, config.data.audio.max_seconds) * MEL_FRAMES_PER_SECOND)
    run = VideoRun(patches, seconds / grids, rules.audio_tokens(mel))
    ids = np.array([rules.video_token_id] + [TEXT_ID] * TEXT_TOKENS)
    labels = np.array([-100] * (1 + TEXT_TOKENS - ANSWER_TOKENS) + [TEXT_ID] * ANSWER_TOKENS)
    one = expand(ids, [run], rules, labels)
    size = config.train.micro_batch_size
    layout = TokenLayout.stack([one.tokens] * size, ids_per_window=rules.ids_per_chunk)
    dtype = getattr(torch, config.model.dtype)

    def rows_of(modality: Modality) -> torch.Tensor:
        return torch.empty(int(layout.counts(modality).sum()), adapter.hidden_size, dtype=dtype)

    return Batch(
        input_ids=torch.from_numpy(one.input_ids).expand(size, -1),
        attention_mask=torch.ones(size, len(one.input_ids), dtype=torch.long),
        labels=torch.from_numpy(one.labels).expand(size, -1),
        position_ids=torch.from_numpy(one.position_ids)[:, None].expand(-1, size, -1),
        layout=layout,
        features=Features(
            video=rows_of(Modality.VIDEO),
            audio=rows_of(Modality.AUDIO),
            extra={name: rows_of(Modality.VIDEO) for name in adapter.deepstack_names("video")},
        ),
        answer_tokens=(ANSWER_TOKENS,) * size,
    ).to("meta")


def summary(module: TrainingModule, batch: Batch) -> list[str]:
    """What the step met."""
    budget = module.compressor.budget(batch.layout)
    learning = {name: p for name, p in module.named_parameters() if p.requires_grad}
    untouched = [name for name, p in learning.items() if p.grad is None]
    return [
        f"frozen parameters      {sum(p.numel() for p in module.parameters() if not p.requires_grad):>15,}",
        f"trainable parameters   {sum(p.numel() for p in learning.values()):>15,}",
        f"  of the compressor    {sum(p.numel() for p in module.compressor.parameters()):>15,}",
        f"tokens per clip        {batch.layout.length:>15,}",
        f"  video, kept          {int(batch.layout.counts(Modality.VIDEO)[0]):>15,} {int(budget.video[0]):>9,}",
        f"  audio, kept          {int(batch.layout.counts(Modality.AUDIO)[0]):>15,} {int(budget.audio[0]):>9,}",
        f"trainables without a gradient: {', '.join(untouched) or 'none'}",
    ]


def on_disk(module: TrainingModule, config: TrainConfig, shapes: str) -> list[str]:
    """What a checkpoint and a feature cache will take."""
    learning = sum(p.numel() for p in module.parameters() if p.requires_grad)
    checkpoint = learning * (BYTES_IN_BFLOAT16 if trains_in_bfloat16(config) else BYTES_IN_FLOAT32)
    stored = config.data.feature_cache_dtype or config.model.dtype
    cache = cache_bytes(shapes, stored, seconds=60.0, media=config.data)
    return [
        f"a checkpoint           {checkpoint / 1e6:>15,.0f} MB",
        f"a feature cache        {cache / 1e6:>15,.0f} MB a minute of video at most, in {stored}",
    ]


def memory(module: TrainingModule, batch: Batch, config: TrainConfig, device_gib: float) -> list[str]:
    """What a rank will need."""
    sizes = sizes_of(module, batch, config)
    return [
        f"Memory of a rank in GiB, estimated for forwards of {sizes.tokens:,} tokens in the LLM (what is kept, and the "
        f"candidates of the masked route), on GPUs of {device_gib:.0f} GiB (--device-gib):",
        *table(config, sizes, RANKS, int(device_gib * 2**30)),
    ]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (BackboneError, CompressorError, ConfigError) as error:
        sys.exit(f"dry_run.py: {error}")
