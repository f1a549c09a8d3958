"""Encoder statistics equal what the definition makes of the stock block's own queries, keys and weights."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import combinations

import pytest
import torch

from omnisieve.backbones.saliency import install_saliency
from omnisieve.compressors.base import Need
from omnisieve.layout import Modality
from omnisieve.ops.segment_attention import attention_received
from tests.backbones.towers import GRIDS, Tower, eager_block, make_tower, tokens_of

TOWERS = ["qwen2_5_audio", "qwen3_audio", "qwen2_5_vision", "qwen2_5_vision_windows", "qwen3_vision"]
VIDEO_SPANS = ("encoder", "frame", "window", "global")
AUDIO_SPANS = ("encoder", "window", "global")


@pytest.fixture(scope="module", params=TOWERS)
def tower(request) -> Tower:
    return make_tower(request.param)


def attention_needs(modality: Modality) -> list[Need]:
    spans = VIDEO_SPANS if modality == Modality.VIDEO else AUDIO_SPANS
    return [Need("attention_received", modality, span) for span in spans]


def all_needs(modality: Modality) -> list[Need]:
    mean_query = [Need("mean_query_attention", modality, "frame")] if modality == Modality.VIDEO else []
    return [*attention_needs(modality), Need("keys", modality), *mean_query]


def segments(tower: Tower, span: str) -> list[int]:
    """Positions per segment, counted by hand."""
    if tower.modality == Modality.VIDEO:
        sizes = {
            "frame": lambda t: [1] * t,
            "window": lambda t: [2] * (t // 2) + [1] * (t % 2),
            "global": lambda t: [t],
        }
        return [n * h * w for t, h, w in GRIDS for n in sizes[span](t)]
    paired = hasattr(tower.module, "avg_pooler")
    # 1730, 207, 400 and 45 mel frames: halved once, or three times within every second.
    positions = [865, 104, 200, 23] if paired else [17 * 13 + 4, 2 * 13 + 1, 4 * 13, 6]
    size = max(positions) if span == "global" else 100 if paired else 26
    return [min(size, n - start) for n in positions for start in range(0, n, size)]


def test_attention_received_as_the_encoder_attends(tower: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = eager_block(tower, monkeypatch).weights
    expected = tokens_of(tower, torch.cat([w.mean(0).sum(0) for w in weights])[:, None])[:, 0]
    need = Need("attention_received", tower.modality)
    found = tower.statistics(need)[need]
    assert expected.std() > 0.05
    assert torch.allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_attention_received_within_other_spans(tower: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    block = eager_block(tower, monkeypatch)
    needs = attention_needs(tower.modality)[1:]
    found = tower.statistics(*needs)
    for need in needs:
        expected = tokens_of(tower, block.received(segments(tower, need.span))[:, None])[:, 0]
        assert torch.allclose(found[need], expected, rtol=2e-6, atol=2e-6), need.span
        assert found[need].mean() == pytest.approx(1, abs=0.02)


def test_spans_differ(tower: Tower) -> None:
    spans = attention_needs(tower.modality)
    found = tower.statistics(*spans)
    same = {
        "qwen2_5_audio": [("encoder", "window")],  # both are 2 s
        "qwen2_5_vision": [("encoder", "frame")],
        "qwen3_vision": [("encoder", "frame")],
    }
    for one, two in combinations(spans, 2):
        equal = torch.allclose(found[one], found[two], atol=1e-3)
        assert equal == ((one.span, two.span) in same.get(tower.name, [])), (one.span, two.span)


def test_keys_are_those_of_the_block(tower: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    block = eager_block(tower, monkeypatch)
    need = Need("keys", tower.modality)
    found = tower.statistics(need)[need]
    assert found.shape[1] == block.key.shape[2]
    assert torch.allclose(found, tokens_of(tower, block.key.mean(0)), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in TOWERS if "vision" in name])
def test_attention_of_the_mean_query_of_a_frame(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = make_tower(name)
    block = eager_block(tower, monkeypatch)
    rows = []
    for query, key in zip(*(x.split(segments(tower, "frame"), dim=1) for x in (block.query, block.key)), strict=True):
        keys = key.unflatten(1, (-1, 4)).mean(2)
        weights = (query.mean(1, keepdim=True) @ keys.mT * block.scaling).softmax(-1).mean(0)[0]
        rows.append(weights.repeat_interleave(4) * len(weights))
    need = Need("mean_query_attention", Modality.VIDEO, "frame")
    found = tower.statistics(need)[need]
    assert torch.allclose(found, tokens_of(tower, torch.cat(rows)[:, None])[:, 0], rtol=2e-6, atol=2e-6)
    assert found.std() > 0.05


def test_an_item_has_the_same_statistics_alone_and_among_others(tower: Tower) -> None:
    needs = all_needs(tower.modality)
    together = tower.statistics(*needs)
    alone = [tower.statistics(*needs, items=slice(i, i + 1)) for i in range(len(tower.items))]
    for need in needs:
        assert torch.allclose(together[need], torch.cat([one[need] for one in alone]), rtol=1e-4, atol=1e-5), need


def test_hooks_are_gone_afterwards_and_none_are_made_for_nothing(tower: Tower) -> None:
    before = tower.hooks()
    with ExitStack() as hooks:
        install_saliency(tower.module, tower.module, [], lambda *_: None, hooks)
        assert tower.hooks() == before
        install_saliency(tower.module, tower.module, [Need("keys", tower.modality)], lambda *_: None, hooks)
        assert tower.hooks() == before + 2
    assert tower.hooks() == before


@pytest.mark.parametrize("bound", [1, 3000, 1 << 26])
def test_no_more_weights_than_the_bound_exist_at_once(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1300, 2, 8).unbind(0)
    lengths = [600, 100, 600]
    pieces = zip(query.split(lengths), key.split(lengths), strict=True)
    expected = [(q.transpose(0, 1) @ k.permute(1, 2, 0) * 0.35).softmax(-1).mean(0).sum(0) for q, k in pieces]
    sizes: list[int] = []
    original = torch.Tensor.softmax
    monkeypatch.setattr("omnisieve.ops.segment_attention.MAX_WEIGHTS", bound)
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: (sizes.append(x.numel()), original(x, dim=dim))[1])
    found = attention_received(query, key, lengths, 0.35)
    # One query at least, and never more than 256 of a segment.
    assert max(sizes) <= max(bound, 2 * 600)
    assert max(sizes) <= 2 * 2 * 256 * 600
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)
    assert torch.allclose(torch.stack([part.mean() for part in found.split(lengths)]), torch.ones(3), atol=1e-5)
