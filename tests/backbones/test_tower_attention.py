"""Encoders attend in few calls, with the values, gradients and statistics of the stock loop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from omnisieve.backbones import adapter_for, load_backbone
from omnisieve.backbones.families import FAMILIES
from omnisieve.backbones.tower_attention import BATCHED_SDPA, segment_attention
from omnisieve.compressors.base import Need
from omnisieve.layout import Modality
from tests.backbones.towers import Tower, make_tower
from tests.models import FAMILIES as FAMILY_NAMES
from tests.models import tiny_thinker

TOWERS = ["qwen2_5_audio", "qwen3_audio", "qwen2_5_vision", "qwen3_vision"]
# Items of `tests.backbones.towers`: windows of 16 patches and smaller ones at the edges, frames of three sizes, sound
# that ends within a window.
LENGTHS = {
    "qwen2_5_audio": [{100, 65, 4, 23}, {100, 65, 4, 23}],
    "qwen3_audio": [{104, 17 * 13 + 4 - 2 * 104, 27, 52, 6}] * 2,
    "qwen2_5_vision": [{16, 8, 4}, {60, 16, 48}],
    "qwen3_vision": [{60, 16, 48}] * 3,
}
"""Distinct lengths of the segments of each layer."""


@pytest.fixture(params=TOWERS)
def tower(request: pytest.FixtureRequest) -> Tower:
    return make_tower(request.param)


def features(tower: Tower, implementation: str = "sdpa", items: slice = slice(None)) -> Tensor:
    tower.module.config._attn_implementation = implementation
    found = tower.run(items)
    return found.last_hidden_state if tower.modality == Modality.AUDIO else found.pooler_output


def count_calls(patch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the sequences that the attention kernel is called with from now on."""
    seen: list[int] = []
    kernel = F.scaled_dot_product_attention
    patch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **k: (seen.append(q.shape[2]), kernel(q, *a, **k))[1]
    )
    return seen


def test_values_are_those_of_the_stock_loop(tower: Tower) -> None:
    with torch.no_grad():
        expected, found = features(tower), features(tower, BATCHED_SDPA)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("item", range(3))
def test_values_of_one_item(tower: Tower, item: int) -> None:
    """Frames of one size are equal segments, as those of a single video are."""
    items = slice(item, item + 1)
    with torch.no_grad():
        torch.testing.assert_close(
            features(tower, BATCHED_SDPA, items), features(tower, items=items), atol=1e-5, rtol=0
        )


def test_gradients_are_those_of_the_stock_loop(tower: Tower) -> None:
    tower.module.requires_grad_(True)
    parameters = dict(tower.module.named_parameters())
    direction = torch.randn(features(tower).shape, generator=torch.Generator().manual_seed(0))
    expected, found = (
        torch.autograd.grad((features(tower, name) * direction).sum(), list(parameters.values()), allow_unused=True)
        for name in ("sdpa", BATCHED_SDPA)
    )
    assert sum(gradient is not None for gradient in expected) > 20
    for name, one, other in zip(parameters, expected, found, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(other, one, atol=1e-5 * float(one.abs().max()), rtol=1e-4, msg=name)


def test_bfloat16_is_as_close_as_the_stock_loop(tower: Tower) -> None:
    with torch.no_grad():
        exact = features(tower)
        half = Tower(tower.name, tower.module.bfloat16(), tower.modality, tower.items)
        if tower.modality == Modality.AUDIO:
            half = Tower(half.name, half.module, half.modality, tuple((x.bfloat16(), n) for x, n in half.items))
        stock, batched = features(half), features(half, BATCHED_SDPA)
    assert batched.dtype == torch.bfloat16
    assert (batched - exact).norm() <= 1.01 * (stock - exact).norm()


def test_one_call_per_layer_and_distinct_length(tower: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    with torch.no_grad():
        features(tower, BATCHED_SDPA)
        few = list(calls)
        features(tower)
    assert few == [length for layer in LENGTHS[tower.name] for length in sorted(layer)]
    assert set(calls[len(few) :]) == set(few)
    assert len(calls) > 2 * len(few)


def test_frames_of_one_video_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = make_tower("qwen2_5_vision")
    calls = count_calls(monkeypatch)
    with torch.no_grad():
        features(tower, BATCHED_SDPA, slice(2, 3))
    assert calls == [8, 16, 48]  # windows, and in the second layer four frames of 8 x 6 patches


def test_statistics_do_not_change(tower: Tower) -> None:
    spans = ("encoder", "window", "global")
    needs = [*(Need("attention_received", tower.modality, span) for span in spans), Need("keys", tower.modality)]
    tower.module.config._attn_implementation = "sdpa"
    expected = tower.statistics(*needs)
    tower.module.config._attn_implementation = BATCHED_SDPA
    found = tower.statistics(*needs)
    for need in needs:
        torch.testing.assert_close(found[need], expected[need], atol=1e-5, rtol=1e-5, msg=str(need))


def looped(query: Tensor, key: Tensor, value: Tensor, bounds: list[int], scaling: float) -> Tensor:
    """[1, N, H, d], one segment after another."""
    parts = [
        F.scaled_dot_product_attention(*(x[:, :, start:end] for x in (query, key, value)), scale=scaling)
        for start, end in pairwise(bounds)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.integers(0, 99))
def test_any_segments_give_what_a_loop_gives(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    states = torch.randn(3, 1, 2, bounds[-1], 4)
    module: Any = SimpleNamespace(is_causal=False)
    found, weights = segment_attention(
        module,
        *states,
        cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32),
        max_length_q=max(lengths),
        scaling=0.3,
        is_causal=False,
    )
    assert weights is None
    torch.testing.assert_close(found, looped(*states, bounds, 0.3), atol=1e-6, rtol=0)


def saved(folder: Path, family: str) -> Path:
    tiny_thinker(family=family).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(
    ("chosen", "expected"), [({}, BATCHED_SDPA), ({"encoder_attn_implementation": "eager"}, "eager")]
)
def test_the_choice_is_the_encoders_alone(family: str, chosen: dict, expected: str, tmp_path: Path) -> None:
    model = load_backbone(saved(tmp_path, family), **chosen)
    adapter = adapter_for(model)
    assert adapter.visual.config._attn_implementation == expected
    assert adapter.audio_tower.config._attn_implementation == expected
    assert adapter.decoder.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_saved_model_is_a_stock_one(family: str, tmp_path: Path) -> None:
    model = load_backbone(saved(tmp_path / "base", family))
    model.save_pretrained(tmp_path / "out")
    assert "omnisieve" not in (tmp_path / "out" / "config.json").read_text()
    thinker: Callable = next(f.thinker for f in FAMILIES if isinstance(model, f.thinker))
    stock = adapter_for(thinker.from_pretrained(tmp_path / "out"))
    assert stock.visual.config._attn_implementation == "sdpa"
