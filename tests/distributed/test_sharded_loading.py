"""Under ZeRO-3 an LLM is spread over the ranks while it is read, from released checkpoints, too."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2_5OmniConfig, Qwen3OmniMoeConfig

from omnisieve.backbones import adapter_for, load_backbone
from omnisieve.backbones.loading import whole
from omnisieve.backbones.media import encoder_fingerprint
from omnisieve.config import LlmSection, LoraSection
from omnisieve.data.sampler import StreamSampler
from omnisieve.training.distributed import Ranks
from omnisieve.training.engine import sharded_loading
from omnisieve.training.streams import Streams
from omnisieve.training.trainer import Trainer
from tests.distributed.launch import run_distributed
from tests.models import FAMILIES, QWEN3, tiny_config, tiny_thinker
from tests.published_layout import named_as_released
from tests.training.batches import CLIPS
from tests.training.runs import Loader, make_config, make_module

pytestmark = pytest.mark.slow

DTYPES = ("float32", "bfloat16")
LORA = LoraSection(rank=4, targets=["q_proj", "v_proj"])


def release(folder: Path, family: str) -> None:
    """A whole model as it is released: other names, towers and thinker under a prefix."""
    save_file(
        dict(named_as_released(tiny_thinker(family=family))), folder / "model.safetensors", metadata={"format": "pt"}
    )
    config = Qwen3OmniMoeConfig if family == QWEN3 else Qwen2_5OmniConfig
    config(thinker_config=tiny_config(family=family).to_dict(), enable_audio_output=False).save_pretrained(folder)


def load(ranks: Ranks, folder: Path, family: str, dtype: Any) -> dict[str, Any]:
    """What a rank holds of a released model that was loaded in shards."""
    expected = tiny_thinker(family=family)
    dtype_of = {name: getattr(torch, dtype) for name, _ in expected.named_parameters()}
    with sharded_loading(make_config(folder, dtype=dtype, zero_stage=3)):
        model = load_backbone(folder / family, dtype)
    # Afterwards models are made whole again.
    assert all(p.numel() == p.data.numel() for p in tiny_thinker().parameters())
    found: dict[str, Any] = {"resident": sum(p.data.numel() for p in model.parameters()), "different": []}
    for (name, parameter), (_, value) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        with whole(parameter):
            if not torch.equal(parameter.data, value.to(dtype_of[name])):
                found["different"].append(name)
    for (name, buffer), (_, value) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        if not torch.equal(buffer, value):
            found["different"].append(name)
    found["fingerprint"] = encoder_fingerprint(adapter_for(model))
    found["whole fingerprint"] = encoder_fingerprint(adapter_for(load_backbone(folder / family, dtype)))
    return found


def train(ranks: Ranks, folder: Path, family: str, mode: Any, stage: int) -> list[float]:
    """Losses of a few steps."""
    folder = folder / f"{family} {mode} {stage}"
    config = make_config(folder, zero_stage=stage, max_steps=3, llm=LlmSection(mode, lr=1e-3, lora=LORA))
    thinker, module = make_module(config, ranks, family)
    sampler = StreamSampler(len(CLIPS), 1, rank=ranks.rank, world_size=ranks.world_size)
    Trainer(config, module, Streams(Loader(thinker, sampler), sampler), ranks).fit()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records]


def job(ranks: Ranks, folder: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = {(f, dtype): load(ranks, folder, f, dtype) for f, dtype in product(FAMILIES, DTYPES)}
    for mode, stage in product(("frozen", "lora", "full"), (1, 2, 3)):
        found[mode, stage] = train(ranks, folder, QWEN3, mode, stage)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("released")
    for family in FAMILIES:
        (folder / family).mkdir()
        release(folder / family, family)
    return run_distributed(job, folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rank_holds_a_whole_parameter_and_none_is_lost(results, family: str, dtype: str):
    for rank in results:
        found = rank[family, dtype]
        assert found["resident"] == 0
        assert found["different"] == []
        assert found["fingerprint"] == found["whole fingerprint"]


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_qwen3_trains_alike_at_every_stage(results, mode: str):
    reference = results[0][mode, 1]
    assert len(reference) == 3
    for stage in (2, 3):
        assert results[0][mode, stage] == pytest.approx(reference, rel=1e-3)
