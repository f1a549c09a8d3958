"""An LLM that is spread over two ranks goes on from where an export ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from omnisieve.backbones import adapter_for
from omnisieve.backbones.tuning import trainable
from omnisieve.config import LlmSection
from omnisieve.trained_llm import read_tuned_llm
from omnisieve.training.build import start_llm
from omnisieve.training.distributed import Ranks
from omnisieve.training.engine import collect
from tests.distributed.launch import run_distributed
from tests.trained import export_tuned, lora_section
from tests.training.runs import make_config, make_module


def job(ranks: Ranks, folder: Path) -> dict[str, float]:
    """The largest difference between what an LLM starts with and what the export holds, by mode."""
    found = {}
    for mode in ("lora", "full"):
        export = folder / "exports" / mode
        llm = LlmSection(mode, lora=lora_section())
        config = make_config(folder / mode, zero_stage=3, init_from=str(export), llm=llm)
        adapter = adapter_for(make_module(config, ranks)[1].backbone)
        start_llm(adapter, config)
        learning, expected = collect(trainable(adapter), keep=True), read_tuned_llm(export).tensors
        assert learning.keys() == expected.keys()
        found[mode] = max(float((learning[name] - value).abs().max()) for name, value in expected.items())
    return found


@pytest.mark.slow
def test_a_spread_llm_goes_on_from_an_export(tmp_path: Path):
    for mode in ("lora", "full"):
        export_tuned(tmp_path / "exports" / mode, mode)
    assert run_distributed(job, tmp_path) == [{"lora": 0, "full": 0}] * 2
