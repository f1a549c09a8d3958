"""SEATS: schedule, first stage, and which tokens a window keeps."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisieve import build_compressor
from omnisieve.compressors import CompressorError, UnreachableRatioError
from omnisieve.compressors.layer_schedules import BlockDecay, transitions
from omnisieve.compressors.seats import Seats
from omnisieve.compressors.topdown import select_top_down
from omnisieve.layout import MEDIA, Modality, TokenLayout
from tests.compressors.cases import Batch, plan_of
from tests.layouts import LayoutSpec, make_layout

DEPTHS = (3, 4, 5, 8, 12, 28, 36, 48)


def seats(depth: int = 28, **fields) -> Seats:
    fields = {"retained_ratio": 0.35} | fields
    return build_compressor("seats", **fields).for_depth(depth)


def window_layout(windows: int = 4) -> TokenLayout:
    return make_layout(LayoutSpec(windows=windows, rows=6, columns=6, audio_per_window=50))


# The schedule.


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(8, (5, 6, 7, 8)), (28, (16, 19, 21, 24)), (36, (21, 24, 27, 31)), (48, (27, 32, 36, 40)), (4, (1, 2, 3, 4))],
)
def test_transitions_are_published_or_at_the_same_fractions(depth: int, expected: tuple[int, ...]) -> None:
    assert transitions(depth) == expected


def test_two_layers_have_no_levels() -> None:
    with pytest.raises(CompressorError, match="at least 3 decoder layers, the model has 2"):
        seats(2)


def test_delta_is_the_paper_s() -> None:
    """Appendix A: C = -42.759 and delta = 0.02947 at R = 0.3."""
    decay = BlockDecay(28, transitions(28))
    assert decay.spans @ decay.falls == pytest.approx(42.759, abs=1e-3)
    assert 0.3 * decay.delta(1.4) == pytest.approx(0.02947, abs=1e-5)
    assert decay.cuts == [15, 17, 19, 22]


def test_feasible_lambdas_are_those_of_the_published_depths() -> None:
    for depth, expected in ((28, (1.217, 1.462)), (48, (1.231, 1.441))):
        assert BlockDecay(depth, transitions(depth)).feasible == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("late_removal", [True, False])
@pytest.mark.parametrize("steps", ["exp", "equal"])
def test_the_mean_over_layers_is_the_ratio_for_every_feasible_lambda(
    depth: int, late_removal: bool, steps: str
) -> None:
    decay = BlockDecay(depth, transitions(depth), late_removal, steps)
    for lambda_ in np.linspace(*decay.feasible, 5):
        levels = decay.levels(lambda_)
        assert decay.spans @ levels == pytest.approx(depth)
        assert (np.diff(levels) <= 1e-9).all()
        assert (levels[decay.used] >= -1e-9).all()


@given(st.sampled_from(DEPTHS), st.booleans(), st.floats(0, 1), st.lists(st.integers(60, 9000), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_fitted_counts_miss_the_mean_by_half_the_last_level_at_most(
    depth: int, late_removal: bool, at: float, asked: list[int]
) -> None:
    decay = BlockDecay(depth, transitions(depth), late_removal)
    low, high = decay.feasible
    wanted = np.array(asked)
    # Away from the ends, where a level has nothing to give or to fall.
    first = np.rint(wanted * (low + (0.2 + 0.6 * at) * (high - low))).astype(int)
    counts = decay.fit(first, wanted)
    np.testing.assert_array_equal(counts[0], first)
    assert (np.diff(counts[decay.used], axis=0) <= 0).all()
    assert (np.abs(decay.spans @ counts - wanted * depth) <= decay.spans[decay.used[-1]] / 2).all()


def test_lambda_is_clipped_to_what_the_depth_allows_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert seats(28).lambda_ == 1.4
        assert not caplog.records
        assert seats(8, lambda_=1.5).lambda_ == pytest.approx(1.412, abs=1e-3)
    assert "lambda_ 1.5 becomes 1.412 on 8 layers" in caplog.text


def test_late_removal_leaves_high_ratios_out_of_reach() -> None:
    layout = window_layout()
    with pytest.raises(
        UnreachableRatioError, match=r"5 of its 28 layers .* 0\.571 to 0\.821 are reachable.*late_removal"
    ):
        seats(retained_ratio=0.9).counts(layout)
    compressor = seats(retained_ratio=0.9, late_removal=False)
    assert compressor.layer_counts(layout).mean() == pytest.approx(0.9 * layout.counts(*MEDIA)[0], rel=0.01)


@pytest.mark.parametrize("fields", [{"retained_ratio": 0.35}, {"video_ratio": 0.3, "audio_ratio": 0.65}])
@pytest.mark.parametrize("depth", [8, 28, 48])
def test_each_modality_has_its_own_mean(fields: dict[str, float], depth: int) -> None:
    layout, asked = window_layout(), None
    compressor = build_compressor("seats", **fields).for_depth(depth)
    asked, budget = compressor.asked(layout), compressor.budget(layout)
    np.testing.assert_array_equal(budget.video, asked.video)
    np.testing.assert_array_equal(budget.audio, asked.audio)


# The stages.


def test_cuts_score_as_published_or_with_the_next_layer() -> None:
    published = [(cut.after, cut.score and (cut.score.layer, cut.score.on)) for cut in seats().cuts()]
    assert published == [(15, (15, "output")), (17, (17, "output")), (19, (19, "output")), (22, None)]
    following = [cut.score and (cut.score.layer, cut.score.on) for cut in seats(next_layer=True).cuts()]
    assert following == [(16, "input"), (18, "input"), (20, "input"), None]
    assert [cut.after for cut in seats(late_removal=False).cuts()] == [15, 17, 19]
    assert seats().settings.kv_policy == "prune_all_layers"


def test_the_first_stage_keeps_lambda_times_the_ratio() -> None:
    layout = window_layout()
    budget = seats(video_ratio=0.3, audio_ratio=0.65, retained_ratio=None).first.budget(layout)
    np.testing.assert_array_equal(budget.video, np.rint(0.42 * layout.counts(Modality.VIDEO)))
    np.testing.assert_array_equal(budget.audio, np.rint(0.91 * layout.counts(Modality.AUDIO)))


def test_diversity_alone_needs_no_attention() -> None:
    assert len(seats().needs) == 2
    assert seats(attention_weighted=False).needs == ()
    assert seats(first="random").needs == ()


def test_attention_decides_among_equally_diverse_tokens() -> None:
    batch = Batch(["audio_video"])
    compressor = build_compressor("windivprune", retained_ratio=0.2)
    needs = batch.needs(compressor)
    with torch.no_grad():
        plain = compressor.plan(batch.embeds, batch.layout, {need: torch.ones_like(x) for need, x in needs.items()})
        weighted = compressor.plan(batch.embeds, batch.layout, needs)
        unweighted = plan_of(compressor.at(attention_weighted=False), batch)
    assert torch.equal(plain.keep, unweighted.keep)
    attention = sum(needs.values())
    assert attention[weighted.keep].mean() > attention[plain.keep].mean()


def test_a_window_keeps_its_best() -> None:
    layout, compressor = window_layout(), seats()
    media = layout.mask(*MEDIA)
    scores = torch.rand(media.shape, generator=torch.Generator().manual_seed(0))
    keep = compressor.keep_after(0, scores, media, layout)
    for modality in MEDIA:
        segments = layout.segments("window", modality)
        for values, chosen in zip(segments.gather(scores)[0], segments.gather(keep)[0], strict=True):
            assert values[chosen].min() > values[~chosen].max()


@pytest.mark.parametrize("normalize_scores", ["length", "zscore"])
def test_normalised_scores_let_windows_differ(normalize_scores: str) -> None:
    """Scores that sum to 1 over hundreds of tokens differ too little for the published temperature."""
    layout = window_layout()
    media, window = layout.mask(*MEDIA), torch.from_numpy(layout.window)
    scores = torch.where(window == 2, 3.0, 1.0) * media / media.sum()

    def of_window(number: int, **fields) -> int:
        keep = seats(tau=1.0, **fields).keep_after(0, scores, media, layout)
        return int((keep & (window == number)).sum())

    assert abs(of_window(2) - of_window(1)) <= 2
    assert of_window(2, normalize_scores=normalize_scores) > 1.5 * of_window(1, normalize_scores=normalize_scores)


@given(st.integers(0, 10**6), st.floats(0.01, 1), st.floats(0.01, 1), st.sampled_from([1e-4, 0.1, 10.0]))
@settings(max_examples=60, deadline=None)
def test_top_down_selection_meets_both_totals(seed: int, video: float, audio: float, tau: float) -> None:
    layout = make_layout(
        LayoutSpec(windows=4, odd_grids=True), LayoutSpec(windows=2, audio=False), LayoutSpec(windows=1)
    )
    generator = torch.Generator().manual_seed(seed)
    alive = layout.mask(*MEDIA) & (torch.rand(layout.modality.shape, generator=generator) < 0.7)
    there = torch.stack([(alive & layout.mask(m)).sum(dim=1) for m in MEDIA], dim=1)
    kept = (there * torch.tensor([video, audio])).long()
    scores = torch.rand(alive.shape, generator=generator)
    keep = select_top_down(scores, alive, layout, kept, tau=tau, official=False)
    assert not (keep & ~alive).any()
    for column, modality in enumerate(MEDIA):
        assert torch.equal((keep & layout.mask(modality)).sum(dim=1), kept[:, column])


@pytest.mark.parametrize(
    "fields",
    [
        {"lambda_": 0.9},
        {"tau": 0.0},
        {"normalize_scores": "max"},
        {"steps": "linear"},
        {"transition_layers": [3, 3, 4, 5]},
        {"transition_layers": [16, 19, 21, 29]},
    ],
)
def test_settings_that_cannot_be(fields: dict) -> None:
    with pytest.raises(CompressorError, match=next(iter(fields))):
        seats(**fields)


def test_transition_layers_may_come_as_a_list() -> None:
    compressor = seats(transition_layers=[10, 12, 14, 20])
    assert [cut.after for cut in compressor.cuts()] == [9, 10, 12, 18]
    layout = window_layout()
    assert compressor.keep_after(0, torch.rand(layout.modality.shape), layout.mask(*MEDIA), layout).any()
