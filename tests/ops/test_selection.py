"""Top-k, diversity, clustering and merging against loops that read like their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisieve.ops.clustering import best_of_group, density_peaks, isolation, uniqueness
from omnisieve.ops.diversity import maxmin_mask, maxmin_order
from omnisieve.ops.estimators import straight_through, token_noise
from omnisieve.ops.merge import merge_into_anchors, spaced_anchors
from omnisieve.ops.similarity import cosine, cosine_to_mean, segment_mean
from omnisieve.ops.topk import topk_mask

RAGGED = torch.tensor([7, 1, 4, 0])


def ragged(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four segments of 7, 1, 4 and no entries, with junk in the padding."""
    x = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(seed))
    valid = torch.arange(7) < RAGGED[:, None]
    return x.masked_fill(~valid.unsqueeze(-1), 99.0), valid


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=12), st.integers(0, 14), st.integers(0, 2**12))
@settings(max_examples=200, deadline=None)
def test_topk_orders_by_score_then_index(values: list[int], count: int, bits: int) -> None:
    scores = torch.tensor(values, dtype=torch.float32).masked_fill(torch.tensor(values) == -2, -torch.inf)
    valid = torch.tensor([bool(bits >> i & 1) for i in range(len(values))])
    order = sorted((i for i in range(len(values)) if valid[i]), key=lambda i: (-scores[i], i))
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[order[:count]] = True
    assert torch.equal(topk_mask(scores, valid, torch.tensor(count)), expected)


def greedy(x: torch.Tensor, count: int, weight: torch.Tensor | None = None) -> list[int]:
    """Max-min selection as it is defined; a weight scales the column of a candidate."""
    distance = 1 - torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    distance = distance if weight is None else distance * weight
    rest, picks = set(range(len(x))), []
    for _ in range(min(count, len(x))):
        reference = picks or None

        def gain(i: int, reference=reference) -> tuple[float, int]:
            others = reference or [j for j in range(len(x)) if j != i]
            return min((float(distance[j, i]) for j in others), default=0.0), -i

        pick = max(rest, key=gain)
        picks.append(pick)
        rest.remove(pick)
    return picks


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_maxmin_is_the_greedy_definition(seed: int, weighted: bool) -> None:
    x, valid = ragged(seed)
    weight = torch.rand(valid.shape, generator=torch.Generator().manual_seed(seed)) if weighted else None
    order = maxmin_order(x, valid, 5, weight)
    for segment, size in enumerate(RAGGED.tolist()):
        expected = greedy(x[segment, :size], 5, None if weight is None else weight[segment, :size])
        assert order[segment, : len(expected)].tolist() == expected


def test_maxmin_counts_hold_for_short_segments_and_duplicates() -> None:
    x, valid = ragged()
    x[0] = x[0, 0]
    counts = torch.tensor([5, 1, 2, 0])
    mask = maxmin_mask(x, valid, counts, 5)
    assert torch.equal(mask.sum(-1), counts)
    assert not (mask & ~valid).any()
    assert not maxmin_mask(x, valid, torch.zeros(4, dtype=torch.long), 0).any()


def test_a_large_weight_does_not_turn_rounding_into_distance() -> None:
    """Duplicates are at distance 0, whatever their weight: nothing is picked twice and the lower index comes first."""
    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 4, 1)
    weight = 1e6 * torch.rand(1, 12, generator=torch.Generator().manual_seed(1))
    order = maxmin_order(x, torch.ones(1, 12, dtype=torch.bool), 12, weight)[0].tolist()
    assert sorted(order) == list(range(12))
    assert {i % 3 for i in order[:3]} == {0, 1, 2}


def test_two_that_are_nearest_to_each_other_are_told_apart_alike_in_every_shape() -> None:
    """A product of matrices rounds the distance from one to the other and back apart, by its shape."""
    size, wide = 5, 13
    x = torch.randn(2000, size, 16, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (0, 0, 0, wide - size), value=1e3)
    valid = torch.arange(wide).expand(len(x), -1) < size
    alone = x, valid[:, :size]
    assert torch.equal(maxmin_order(*alone, 1), maxmin_order(padded, valid, 1))
    for metric in ("cosine", "euclidean"):
        peaks = density_peaks(*alone, 1, metric), density_peaks(padded, valid, 1, metric)[:, :size]
        torch.testing.assert_close(*peaks, rtol=1e-3, atol=1e-3)


def test_maxmin_copes_with_zero_vectors() -> None:
    x = torch.zeros(1, 4, 3)
    assert sorted(maxmin_order(x, torch.ones(1, 4, dtype=torch.bool), 4)[0].tolist()) == [0, 1, 2, 3]


def cosine_distance(x: torch.Tensor) -> torch.Tensor:
    return 1 - torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)


def density_by_hand(distance: torch.Tensor, k: int, power: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Density peaks and isolation of one segment."""
    n = len(distance)
    others = [[float(distance[i, j]) for j in range(n) if j != i] for i in range(n)]
    mean = torch.tensor([sum(d**power for d in sorted(row)[:k]) / max(min(k, n - 1), 1) for row in others])
    density = (-mean).exp()
    peaks = []
    for i in range(n):
        denser = [float(distance[i, j]) for j in range(n) if density[j] > density[i]]
        peaks.append((min(denser) if denser else max(others[i], default=0.0)) * float(density[i]))
    return torch.tensor(peaks), mean


@pytest.mark.parametrize("neighbours", [1, 3, 10])
def test_density_peaks_and_isolation_are_their_definitions(neighbours: int) -> None:
    x, valid = ragged()
    peaks, alone = density_peaks(x, valid, neighbours), isolation(x, valid, neighbours)
    for segment, size in enumerate(RAGGED.tolist()):
        expected = density_by_hand(cosine_distance(x[segment, :size]), neighbours)
        torch.testing.assert_close(peaks[segment, :size], expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone[segment, :size], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("neighbours", [1, 3, 10])
def test_euclidean_density_peaks_square_the_distances_of_the_density(neighbours: int) -> None:
    x, valid = ragged()
    peaks = density_peaks(x, valid, neighbours, "euclidean")
    for segment, size in enumerate(RAGGED.tolist()):
        tokens = x[segment, :size]
        expected, _ = density_by_hand((tokens[:, None] - tokens[None]).norm(dim=-1), neighbours, power=2)
        torch.testing.assert_close(peaks[segment, :size].exp(), expected, rtol=1e-4, atol=1e-6)


def test_euclidean_density_peaks_are_told_apart_where_densities_underflow() -> None:
    """Of a tight and a loose cluster of wide rows the centre of the tight one comes first."""
    x = torch.randn(2, 8, 512, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0])[:, None, None]
    x = torch.cat([x[0], x[1] + 10]).unsqueeze(0)
    peaks = density_peaks(x, torch.ones(1, 16, dtype=torch.bool), 3, "euclidean")
    assert not peaks.exp().any()
    assert len(peaks.unique()) == 16
    assert peaks.argmax() < 8


def test_uniqueness_is_measured_from_the_mean_in_the_steadiest_channels() -> None:
    x, valid = ragged()
    x = torch.cat([x, 100 * x.flip(-1), x * 0.1], dim=-1)
    unlike = uniqueness(x, valid)
    for segment, size in enumerate(RAGGED.tolist()):
        if not size:
            continue
        tokens = x[segment, :size]
        steady = tokens.var(dim=0, unbiased=False).argsort()[: x.shape[-1] // 2]
        directions = torch.nn.functional.normalize(tokens[:, steady], dim=-1)
        distance = (directions - directions.mean(dim=0)).square().sum(dim=-1)
        near = sum(torch.exp(-distance / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))
        torch.testing.assert_close(unlike[segment, :size], 1 - near / near.max(), rtol=1e-4, atol=1e-5)


def test_best_of_group_takes_the_best_of_each() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7, 0.7, 0.2]])
    group = torch.tensor([[0, 0, 0, 1, 1, 2]])  # the last is in no group
    chosen = best_of_group(scores, group, groups=2, most=1)
    assert chosen.tolist() == [[False, True, False, True, False, False]]
    assert best_of_group(scores, group, groups=2, most=2).sum() == 4


def test_spaced_anchors_are_evenly_spread_over_candidates() -> None:
    candidates = torch.tensor([[True] * 7 + [False], [False, True] * 4])
    anchors = spaced_anchors(candidates, np.array([7, 4]), np.array([3, 0]))
    assert anchors[0].nonzero()[:, 0].tolist() == [0, 2, 4]
    assert not anchors[1].any()


def test_an_anchor_becomes_half_itself_half_the_weighted_mean_of_its_best_tokens() -> None:
    x = torch.tensor([[[1.0, 0], [0, 1], [2, 0.1], [3, 0.2], [0.3, 4], [1, 0.3]]])
    anchors = torch.tensor([[True, True, False, False, False, False]])
    likeness = torch.tensor([[0, 0, 0.5, 0.2, -torch.inf, -0.9]])
    source, target, weight, own = merge_into_anchors(x, anchors, ~anchors, likeness, most=2, group=2)
    merged = x[0] * own[0][:, None]
    merged.index_add_(0, target[0], x[0, source[0]] * weight[0][:, None])
    share = torch.softmax(torch.tensor([0.5, 0.2]), dim=0)
    torch.testing.assert_close(merged[0], x[0, 0] / 2 + (share[0] * x[0, 2] + share[1] * x[0, 3]) / 2)
    torch.testing.assert_close(merged[1], (x[0, 1] + x[0, 4]) / 2)
    assert torch.equal(merged[2:], x[0, 2:])


def test_nothing_is_merged_without_an_anchor() -> None:
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    anchors = torch.tensor([[True, False, False, False], [False] * 4])
    _, _, weight, own = merge_into_anchors(x, anchors, ~anchors, torch.zeros(2, 4), most=1, group=3)
    assert weight[0].sum() > 0
    assert not weight[1].any()
    assert (own[1] == 1).all()


def test_similarities_ignore_padding_and_zero_vectors() -> None:
    x, valid = ragged()
    mean = segment_mean(x, valid)
    torch.testing.assert_close(mean[0], x[0].mean(0))
    torch.testing.assert_close(mean[2], x[2, :4].mean(0))
    assert not mean[3].any()
    expected = torch.nn.functional.cosine_similarity(x[2, :4], x[2, :4].mean(0), dim=-1)
    torch.testing.assert_close(cosine_to_mean(x, valid)[2, :4], expected)
    assert cosine(torch.zeros(3), torch.ones(3)) == 0


def test_half_precision_is_widened() -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert cosine(x, x.flip(0)).dtype == torch.float32
    torch.testing.assert_close(cosine(x, x.flip(0)), cosine(x.float(), x.float().flip(0)))


def test_gate_has_the_mask_s_value_and_the_score_s_gradient() -> None:
    scores = torch.tensor([0.2, 0.7, 0.4], requires_grad=True)
    gate = straight_through(torch.tensor([True, False, True]), scores)
    assert gate.tolist() == [1.0, 0.0, 1.0]
    (gate * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert scores.grad.tolist() == [1.0, 2.0, 3.0]


def test_candidates_are_sampled_among_the_dropped() -> None:
    dropped = torch.tensor([True, False] * 10)
    places = np.arange(20, dtype=np.uint64)
    noise = torch.from_numpy(token_noise(np.arange(50, dtype=np.uint64)[:, None], places))
    draws = topk_mask(noise, dropped.expand(50, -1), torch.full((50,), 4))
    assert (draws.sum(-1) == 4).all()
    assert not (draws & ~dropped).any()
    assert torch.equal(draws.any(0), dropped)


def test_noise_is_uniform_and_knows_no_neighbours() -> None:
    noise = token_noise(np.arange(200, dtype=np.uint64)[:, None], np.arange(500, dtype=np.uint64))
    share, _ = np.histogram(noise, bins=20, range=(0, 1))
    assert abs(share / noise.size - 0.05).max() < 0.003  # four standard deviations
    for axis in (0, 1):
        pairs = np.corrcoef(noise.take(range(199), axis).ravel(), noise.take(range(1, 200), axis).ravel())
        assert abs(pairs[0, 1]) < 0.02
    assert noise.min() >= 0
    assert noise.max() < 1
