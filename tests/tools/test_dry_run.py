"""The recipe for the released model fits the released model's shapes."""

from __future__ import annotations

import pytest
from tools import dry_run

RECIPE = "recipes/omnisift_qwen2_5_omni_7b.yaml"


@pytest.mark.parametrize(
    ("shapes", "frozen", "trainable"),
    [
        ("qwen2_5_omni_7b", "8,931,813,888", "4,894,983"),
        ("qwen3_omni_30b_a3b", "31,719,205,488", "3,322,119"),
    ],
)
def test_one_step_of_the_7b_recipe_on_real_shapes(
    shapes: str, frozen: str, trainable: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run.main(["--config", RECIPE, "--shapes", shapes, "--seconds", "30"]) == 0
    printed = capsys.readouterr().out
    assert frozen in printed
    assert trainable in printed
    assert "without a gradient: none" in printed
