"""The recipes for released models fit the released models' shapes, and the GPUs they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tools import dry_run

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {
    "omnisift_qwen2_5_omni_3b": ("qwen2_5_omni_3b", "4,703,464,448", "3,322,119"),
    "omnisift_qwen2_5_omni_7b": ("qwen2_5_omni_7b", "8,931,813,888", "4,894,983"),
    "omnisift_qwen2_5_omni_7b_full": ("qwen2_5_omni_7b", "1,316,197,376", "7,620,472,833"),
    "omnisift_lora_qwen3_omni_30b_a3b": ("qwen3_omni_30b_a3b", "31,719,205,488", "16,691,463"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_step_of_a_recipe_on_real_shapes(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    shapes, frozen, trainable = RECIPES[recipe]
    assert dry_run.main(["--config", f"recipes/{recipe}.yaml", "--shapes", shapes, "--seconds", "30"]) == 0
    printed = capsys.readouterr().out
    assert frozen in printed
    assert trainable in printed
    assert "without a gradient: none" in printed
    # The recipe's comments have the same figures.
    written = (ROOT / "recipes" / f"{recipe}.yaml").read_text()
    for noun, said in (
        ("checkpoint", r"a checkpoint is ([\d,]+) MB"),
        ("feature cache", r"at most ([\d,]+) MB a minute"),
    ):
        found = re.search(said, written)
        if found or noun == "feature cache":
            assert re.search(rf"a {noun} +{found[1]} MB", printed), noun
    by_ranks = {line.split()[0]: line for line in printed.splitlines() if line[:5].strip().isdigit()}
    assert " fits 80 GiB" in by_ranks["8"]


def test_a_preset_is_read_as_by_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["--config", "recipes/omnisift_qwen2_5_omni_7b.yaml", "--shapes", "qwen2_5_omni_7b", "--seconds", "4"]
    assert dry_run.main([*recipe, "compressor.preset=omnisift/7b/35", "compressor.retained_ratio=null"]) == 0
    kept = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if ", kept" in line}
    assert kept == {"video,": "395", "audio,": "60"}  # 0.33 of 1196 and 0.6 of 100
