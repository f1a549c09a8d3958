"""OmniDrop: the schedule and its means, the first stage, and what is spared for its distance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisieve import build_compressor
from omnisieve.compressors import CompressorError, UnreachableRatioError
from omnisieve.compressors.layer_schedules import ProgressivePruning
from omnisieve.compressors.omnidrop import OmniDrop
from omnisieve.layout import MEDIA, Modality, TokenLayout
from tests.compressors.cases import Batch, plan_of
from tests.layouts import LayoutSpec, make_layout

PRESETS = {"7b/30": 28.8, "7b/20": 20.6, "3b/30": 29.1, "3b/20": 20.6}


def omnidrop(depth: int = 28, **fields) -> OmniDrop:
    return build_compressor("omnidrop", **fields).for_depth(depth)


def published_clip(windows: int = 40) -> TokenLayout:
    """288 video and 50 audio tokens in each window."""
    return make_layout(LayoutSpec(windows=windows, rows=12, columns=12, audio_per_window=50))


# The schedule.


@pytest.mark.parametrize(("preset", "mean"), PRESETS.items())
def test_presets_retain_what_their_schedules_say(preset: str, mean: float) -> None:
    """From 45 % on, as the paper counts; the paper itself says 30 and 20."""
    compressor = omnidrop({"7b": 28, "3b": 36}[preset[:2]], preset=f"omnidrop/{preset}")
    s = compressor.settings
    assert 45 * compressor.pruning.retention(s.p_init, s.p_final).mean() == pytest.approx(mean, abs=0.1)


def test_published_counts_are_floors() -> None:
    compressor, layout = omnidrop(preset="omnidrop/7b/20"), published_clip(4)
    left = [int(compressor.first.budget(layout).total[0])]
    for layer in range(27):
        rate = 0.02 + 0.48 / (1 + np.exp(-20 * (layer / 26 - 0.5)))
        left.append(left[-1] - int(left[-1] * rate))
    np.testing.assert_array_equal(compressor.layer_counts(layout)[:, 0], left)


@given(
    st.sampled_from([3, 4, 8, 28, 36, 48]),
    st.floats(0.08, 1),
    st.sampled_from(["sigmoid", "exponential"]),
    st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 50)),
)
@settings(max_examples=80, deadline=None)
def test_the_mean_over_layers_is_exactly_the_budget(
    depth: int, ratio: float, schedule: str, size: tuple[int, int, int]
) -> None:
    windows, rows, audio = size
    layout = make_layout(LayoutSpec(windows=windows, rows=rows, audio_per_window=audio), LayoutSpec(audio=False))
    compressor = omnidrop(depth, retained_ratio=ratio, schedule=schedule)
    counts = compressor.layer_counts(layout)
    assert (np.diff(counts, axis=0) <= 0).all()
    asked = compressor.asked(layout).total
    entering = counts[0]
    # What enters is rounded too: where it is less than the mean, or all that the mean allows, this is as near as it is.
    fits = (asked <= entering) & (entering <= asked * depth)
    np.testing.assert_array_equal(counts.sum(axis=0)[fits], (asked * depth)[fits])
    assert (np.abs(counts.mean(axis=0) - asked) <= 1).all()


def test_p_init_follows_the_share_and_rises_where_p_final_is_not_enough() -> None:
    pruning = ProgressivePruning(28)
    p_init, p_final = pruning.solve(np.array([1.0, 0.675, 0.55, 0.15]))
    np.testing.assert_allclose(p_init[:3], [0, 0, 0.02])
    assert p_init[3] > 0.1
    np.testing.assert_allclose(p_final[[0, 3]], [0, 1], atol=1e-9)
    np.testing.assert_allclose(pruning.retention(p_init, p_final).mean(axis=-1), [1.0, 0.675, 0.55, 0.15])


@pytest.mark.parametrize("depth", [8, 28])
def test_the_first_stage_grows_and_shrinks_with_the_ratio(depth: int) -> None:
    fields = [omnidrop(depth, retained_ratio=ratio).first_fields() for ratio in (0.05, 0.1, 0.35, 0.6, 1.0)]
    assert fields[2] == {"video_ratio": 0.4, "audio_ratio": 0.7}
    for name in fields[0]:
        shares = [field[name] for field in fields]
        assert shares == sorted(shares)
        assert shares[-1] == 1


def test_a_given_p_init_may_leave_a_ratio_out_of_reach() -> None:
    with pytest.raises(UnreachableRatioError, match=r"on average over 28 layers; .* reachable are .* p_init"):
        omnidrop(retained_ratio=0.5, p_init=0.3, first="random").counts(published_clip(4))


def test_the_published_first_stage_cannot_keep_more_than_it_does() -> None:
    with pytest.raises(UnreachableRatioError, match="enter the LLM"):
        omnidrop(retained_ratio=0.6, rounding="official").counts(published_clip(4))


# The first stage.


def test_the_paper_s_shares_of_a_clip() -> None:
    layout = published_clip(4)
    budget = omnidrop(retained_ratio=0.3).first.budget(layout)
    assert budget.video[0] == round(0.4 * 1152)
    assert budget.audio[0] == 140


def test_attended_audio_stays_and_whole_frames_are_first_of_four() -> None:
    batch = Batch(["audio_video"])
    first = omnidrop(retained_ratio=0.3).first
    keep, layout = plan_of(first, batch).keep, batch.layout
    frames = layout.segments("frame", Modality.VIDEO)
    kept = (frames.gather(keep) & frames.valid).sum(dim=-1)[0].tolist()
    assert kept[0] == kept[4] == 16
    assert max(kept[1:4] + kept[5:]) < 16
    audio = layout.segments("window", Modality.AUDIO)
    attention = audio.gather(next(iter(batch.needs(first).values())))
    relative = audio.scatter(attention / attention.mean(dim=-1, keepdim=True), 0.0)
    chosen = keep & layout.mask(Modality.AUDIO)
    assert relative[chosen].min() > relative[layout.mask(Modality.AUDIO) & ~chosen].max()


def test_a_single_frame_gives_way() -> None:
    """DyCoke keeps it whole; the ratio would be out of reach."""
    batch = Batch(["one_short_window"])
    compressor = omnidrop(retained_ratio=0.3)
    plan = plan_of(compressor, batch)
    assert plan.measured(batch.layout)["video"] == compressor.first.budget(batch.layout).video == 2


# The choice.


def by_hand(
    scores: np.ndarray, window: np.ndarray, alive: np.ndarray, pruned: int, weight: float, *, scaled: bool
) -> set[int]:
    """Algorithm 1 of the paper: positions that go."""
    tokens = sorted(np.flatnonzero(alive), key=lambda i: (scores[i], -i))
    top = tokens[-1]
    candidates = tokens[: 2 * pruned]
    scale = scores[top] if scaled else 1.0
    augmented = {
        i: scores[i] / scale + weight * abs(window[top] - window[i]) / max(window.max(), 1) for i in candidates
    }
    return set(sorted(candidates, key=lambda i: (augmented[i], -i))[:pruned])


@pytest.mark.parametrize("normalize", ["none", "max"])
@pytest.mark.parametrize("seed", range(3))
def test_the_distant_are_spared_as_in_the_paper_s_algorithm(normalize: str, seed: int) -> None:
    layout = make_layout(LayoutSpec(windows=5))
    compressor = omnidrop(retained_ratio=0.3, normalize=normalize)
    generator = torch.Generator().manual_seed(seed)
    media = layout.mask(*MEDIA)[0].nonzero()[:, 0]
    for cut in (13, 14, 20):
        there = media[torch.randperm(len(media), generator=generator)[: int(compressor.counts(layout)[cut, 0]) + 7]]
        alive = torch.zeros(layout.modality.shape, dtype=torch.bool).index_fill(1, there, True)
        scores = torch.rand(alive.shape, generator=generator) * alive / alive.sum()
        keep = compressor.keep_after(cut, scores, alive, layout)
        weight = 0.2 if cut >= 14 else 0.0
        gone = by_hand(
            scores[0].double().numpy(), layout.window[0], alive[0].numpy(), 7, weight, scaled=normalize == "max"
        )
        assert set((alive & ~keep)[0].nonzero()[:, 0].tolist()) == gone


@pytest.mark.parametrize(("depth", "first"), [(28, 14), (36, 19), (8, 4)])
def test_diversity_begins_in_the_middle(depth: int, first: int) -> None:
    layout = make_layout(LayoutSpec(windows=5))
    alive = layout.mask(*MEDIA)
    scores = torch.rand(alive.shape, generator=torch.Generator().manual_seed(0)) * alive / alive.sum()
    plain, diverse = (omnidrop(depth, retained_ratio=0.3, lambda_div=weight) for weight in (0.0, 0.2))
    same = [
        torch.equal(*(c.keep_after(cut, scores, alive, layout) for c in (plain, diverse))) for cut in range(depth - 1)
    ]
    assert all(same[:first])
    assert not any(same[first:])


@pytest.mark.parametrize(
    "fields",
    [
        {"p_final": 0.2},
        {"p_init": 1.5},
        {"p_init": 0.0, "schedule": "exponential"},
        {"schedule": "linear"},
        {"query": "none"},
        {"normalize": "sum"},
    ],
)
def test_settings_that_cannot_be(fields: dict) -> None:
    with pytest.raises(CompressorError, match=next(iter(fields))):
        omnidrop(retained_ratio=0.3, **fields)
