"""A training step from a feature cache is the step that encodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omnisieve.backbones import Estimator, adapter_for, feature_name
from omnisieve.compressors import build_compressor
from omnisieve.data.batch import Batch, Features
from omnisieve.data.feature_cache import FeatureCache, media_key
from omnisieve.data.feature_shards import Origin
from omnisieve.data.feature_writer import FeatureCacheWriter
from omnisieve.data.manifest import MediaPart
from omnisieve.data.tokens import AudioRun, Run, VideoRun
from omnisieve.training.objective import TrainingModule
from tests.models import FAMILIES, HIDDEN, MERGE, QWEN3, Media, tiny_thinker
from tests.training.batches import CLIPS, make_batch, with_features

SOUND_AND_SILENCE = CLIPS[:4]


def make_module(family: str, dtype: torch.dtype) -> TrainingModule:
    """A module whose compressor starts from a method that needs encoder statistics."""
    backbone = tiny_thinker(family=family, dtype=dtype)
    torch.manual_seed(1)
    compressor = build_compressor(
        "omnisift", hidden_size=HIDDEN, retained_ratio=0.4, width=16, heads=2, pruner_channels=8, base="visionzip_om"
    )
    assert compressor.needs
    return TrainingModule(backbone, compressor, estimator=Estimator("masked"), distill_weight=0.5).train()


def run_of(item: Media, family: str) -> Run:
    sound = item.qwen3_audio_tokens if family == QWEN3 else item.audio_tokens
    if not item.grids:
        return AudioRun(sound)
    return VideoRun((item.grids, item.rows * MERGE, item.columns * MERGE), item.second_per_grid, sound)


def make_cache(module: TrainingModule, family: str, stored: str, folder: Path) -> Sequence[Features]:
    """What is read of each of `SOUND_AND_SILENCE` from a cache that was made clip by clip."""
    adapter, needs = adapter_for(module.backbone), module.compressor.needs
    origin = Origin({}, str(adapter.visual.dtype).removeprefix("torch."), stored)
    writer = FeatureCacheWriter(folder / "cache", origin, statistics=[feature_name(need) for need in needs])
    parts = []
    for number, (item,) in enumerate(SOUND_AND_SILENCE):
        part = MediaPart("video" if item.grids else "audio", folder / str(number))
        part.path.write_text(str(number))
        alone = make_batch(module.backbone, [[item]])
        writer.add(part, media_key(part), run_of(item, family), adapter.encode(alone, needs))
        parts.append(part)
    writer.finish(writer.close())
    cache = FeatureCache(folder / "cache", {})
    return [cache.read(part).features for part in parts]


def step(module: TrainingModule, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and gradients by name."""
    module.zero_grad()
    with module.attached():
        loss = module(batch, seed=3)["loss"]
        loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "stored"), [
    (torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.bfloat16, "float32"),
])  # fmt: skip
def test_a_step_from_the_cache_is_the_step_that_encodes(
    family: str, dtype: torch.dtype, stored: str, tmp_path: Path
) -> None:
    """Sounding, silent and audio alone, with statistics, deepstack features and a teacher."""
    module = make_module(family, dtype)
    cached = make_cache(module, family, stored, tmp_path)
    # Encoders that see several clips at once may round in another way than one by one.
    several = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for clips, tolerance in ((slice(0, 1), {"rtol": 0, "atol": 0}), (slice(None), several)):
        batch = make_batch(module.backbone, SOUND_AND_SILENCE[clips])
        online, gradients = step(module, batch)
        loss, others = step(module, with_features(batch, Features.join(cached[clips])))
        assert any(gradient.any() for gradient in gradients.values())
        torch.testing.assert_close(loss, online, **tolerance)
        torch.testing.assert_close(others, gradients, **tolerance)
