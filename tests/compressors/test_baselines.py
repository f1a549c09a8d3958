"""What each training-free method means, beyond golden vectors and the matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omnisieve.compressors import CompressorError, UnreachableRatioError, build_compressor
from omnisieve.layout import Modality, TokenLayout
from tests.layouts import LayoutSpec, make_layout

WIDE = LayoutSpec(windows=4, rows=4, columns=6, audio_per_window=20)


def embeddings(layout: TokenLayout, seed: int = 0) -> torch.Tensor:
    return torch.randn(layout.batch_size, layout.length, 12, generator=torch.Generator().manual_seed(seed))


class TestFull:
    def test_is_the_identity(self) -> None:
        layout = make_layout(LayoutSpec(images=3), LayoutSpec(windows=1))
        assert build_compressor("full").plan(embeddings(layout), layout).is_identity(layout)

    @pytest.mark.parametrize("ratio", [{"retained_ratio": 0.5}, {"video_ratio": 0.5, "audio_ratio": 1.0}])
    def test_reaches_no_other_ratio(self, ratio: dict[str, float]) -> None:
        with pytest.raises(UnreachableRatioError, match="reachable is 1 only"):
            build_compressor("full", **ratio)
        with pytest.raises(UnreachableRatioError):
            build_compressor("full").at(**ratio)


class TestRandom:
    def test_copies_of_a_sample_keep_the_same(self) -> None:
        layout = make_layout(LayoutSpec(), LayoutSpec(windows=2)).select(np.array([0, 1, 1, 0]))
        keep = build_compressor("random", retained_ratio=0.3).plan(embeddings(layout), layout).keep
        assert torch.equal(keep[0], keep[3])
        assert torch.equal(keep[1], keep[2])

    def test_every_token_is_kept_by_some_seed_at_the_asked_rate(self) -> None:
        layout = make_layout(LayoutSpec())
        draws = torch.stack(
            [
                build_compressor("random", retained_ratio=0.25, seed=seed).plan(embeddings(layout), layout).keep[0]
                for seed in range(400)
            ]
        )
        for modality in (Modality.VIDEO, Modality.AUDIO):
            share = draws[:, layout.mask(modality)[0]].float().mean(0)
            assert share.min() > 0.15
            assert share.max() < 0.35


class TestStvp:
    def test_an_odd_token_outlives_a_uniform_surrounding(self) -> None:
        layout = make_layout(LayoutSpec(audio_per_window=20))
        x = torch.ones(1, layout.length, 12)
        odd = {}
        for modality in (Modality.VIDEO, Modality.AUDIO):
            segments = layout.segments("frame" if modality == Modality.VIDEO else "window", modality)
            odd[modality] = segments.index[0, :, 5]
            x[0, odd[modality]] = torch.randn(len(odd[modality]), 12, generator=torch.Generator().manual_seed(1))
        keep = build_compressor("stvp", retained_ratio=0.1).plan(x, layout).keep[0]
        for positions in odd.values():
            assert keep[positions].all()

    def test_a_changed_patch_outlives_a_still_one(self) -> None:
        layout = make_layout(LayoutSpec(audio=False))
        x = embeddings(layout)
        frames = layout.segments("frame", Modality.VIDEO).index[0]
        x[0, frames[1]] = x[0, frames[0]]
        x[0, frames[1, [2, 9]]] *= -1
        keep = build_compressor("stvp", retained_ratio=2 / 16).plan(x, layout).keep[0]
        assert keep[frames[1]].nonzero()[:, 0].tolist() == [2, 9]

    def test_novelty_weighs_change_against_distinctness(self) -> None:
        """Ten equal tokens, then ten others: change marks the border, the mean sees two equal halves."""
        layout = make_layout(LayoutSpec(windows=1, video=False, audio_per_window=20))
        first, second = torch.eye(12)[:2]
        tokens = layout.segments("window", Modality.AUDIO).index[0, 0]
        x = torch.zeros(1, layout.length, 12)
        x[0, tokens[:10]], x[0, tokens[10:]] = first, second
        scores = build_compressor("stvp", retained_ratio=0.1, audio_novelty=1.0).plan(x, layout).scores[0, tokens]
        assert scores[1:].argmax() == 9
        assert scores[10] == 1
        scores = build_compressor("stvp", retained_ratio=0.1, audio_novelty=0.0).plan(x, layout).scores[0, tokens]
        torch.testing.assert_close(scores, scores[:1].expand(20))

    def test_weight_out_of_range_is_refused(self) -> None:
        with pytest.raises(CompressorError, match=r"audio_novelty is 1\.5"):
            build_compressor("stvp", retained_ratio=0.1, audio_novelty=1.5)


class TestDivPruneOm:
    def test_no_duplicate_while_there_is_something_new(self) -> None:
        layout = make_layout(LayoutSpec(audio=False))
        kinds = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
        x = kinds[torch.arange(layout.length) % 4][None]
        keep = build_compressor("divprune_om", retained_ratio=4 / 16).plan(x, layout).keep[0]
        for frame in layout.segments("frame", Modality.VIDEO).index[0]:
            assert sorted(int(p) % 4 for p in frame[keep[frame]]) == [0, 1, 2, 3]


class TestOmniZip:
    def plan(self, layout: TokenLayout, attention: torch.Tensor | None = None, x=None, **fields):
        compressor = build_compressor("omnizip", **fields)
        if attention is None:
            attention = torch.rand(1, layout.length, generator=torch.Generator().manual_seed(2)) + 0.1
        return compressor.plan(embeddings(layout) if x is None else x, layout, {compressor.needs[0]: attention})

    def test_a_window_that_keeps_more_audio_keeps_more_video(self) -> None:
        layout = make_layout(WIDE)
        # Raw attention of the whole file: the second window takes it all.
        window = torch.from_numpy(layout.window)
        attention = (window == 1).float() + 0.01 * torch.rand(window.shape, generator=torch.Generator().manual_seed(0))
        keep = self.plan(layout, attention, retained_ratio=0.3, scope="file").keep
        video = layout.segments("window", Modality.VIDEO)
        per_window = (video.gather(keep) & video.valid).sum(-1)[0]
        assert per_window.argmax() == 1
        assert per_window[1] > per_window[[0, 2, 3]].max() + 5

    @pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5, 0.9])
    def test_bounds_give_way_to_the_budget(self, ratio: float) -> None:
        layout = make_layout(WIDE)
        plan = self.plan(layout, video_ratio=ratio, audio_ratio=0.4)
        assert plan.measured(layout)["video"] == round(ratio * 4 * 2 * 24)

    def test_published_clamps_do_not(self) -> None:
        """Asked for a twentieth, published OmniZip keeps a quarter; the plan says that its count is a bound."""
        layout = make_layout(WIDE)
        plan = self.plan(layout, video_ratio=0.05, audio_ratio=0.4, rounding="official")
        assert not plan.exact
        assert plan.measured(layout)["video"] >= 0.25 * 4 * 2 * 24

    def test_attention_is_ranked_relative_to_its_window(self) -> None:
        """Louder blocks do not win; with the whole file in scope they do."""
        layout = make_layout(WIDE)
        attention = torch.rand(1, layout.length, generator=torch.Generator().manual_seed(0)) + 0.5
        scaled = attention * (1 + 10 * (torch.from_numpy(layout.window) == 2))
        for scope, same in (("window", True), ("file", False)):
            kept = [self.plan(layout, a, retained_ratio=0.3, scope=scope).keep for a in (attention, scaled)]
            assert torch.equal(*kept) is same

    def test_anchors_count_as_kept_audio(self) -> None:
        layout = make_layout(WIDE)
        plan = self.plan(layout, retained_ratio=0.25)
        assert plan.measured(layout)["audio"] == 20
        assert plan.merge is not None
        merged = plan.merge.own[0] != 1
        # 5 % of 80 tokens; every anchor that took something up is kept, everything else is left as it was.
        assert 1 <= merged.sum() <= 4
        assert plan.keep[0, merged].all()
        x = embeddings(layout)
        torch.testing.assert_close(plan.merge.apply(x)[0, ~merged], x[0, ~merged], rtol=0, atol=0)

    def test_the_paper_hears_the_file_and_compares_within_the_window(self) -> None:
        compressor = build_compressor("omnizip", retained_ratio=0.25, variant="paper")
        assert compressor.needs[0].span == "global"
        assert (compressor.scope, compressor.merge_scope) == ("file", "window")
        published = build_compressor("omnizip", retained_ratio=0.25, variant="paper", rounding="official")
        assert (published.scope, published.merge_scope) == ("file", "window")
        chosen = build_compressor("omnizip", retained_ratio=0.25, variant="paper", scope="window", merge_scope="file")
        assert (chosen.scope, chosen.merge_scope) == ("window", "file")

    def test_the_paper_sees_lengths_and_core_directions(self) -> None:
        """Scaling tokens leaves their directions alone."""
        layout = make_layout(WIDE)
        x = embeddings(layout)
        scaled = x * (1 + torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(3))).unsqueeze(-1)
        for variant, same in (("core", True), ("paper", False)):
            kept = [self.plan(layout, x=values, retained_ratio=0.3, variant=variant).keep for values in (x, scaled)]
            assert torch.equal(*kept) is same

    def test_without_anchors_nothing_is_merged(self) -> None:
        assert self.plan(make_layout(WIDE), retained_ratio=0.25, merge_group=0).merge is None

    def test_missing_attention_is_named(self) -> None:
        layout = make_layout(WIDE)
        with pytest.raises(CompressorError, match="omnizip needs attention_received of audio tokens"):
            build_compressor("omnizip", retained_ratio=0.25).plan(embeddings(layout), layout)

    @pytest.mark.parametrize(
        "fields",
        [
            {"variant": "cores"},
            {"scope": "item"},
            {"merge_scope": "item"},
            {"rho_min": 0.8},
            {"merge_group": -1},
            {"neighbours": 0},
        ],
    )
    def test_settings_that_cannot_be_are_refused(self, fields: dict) -> None:
        with pytest.raises(CompressorError, match=str(next(iter(fields.values())))):
            build_compressor("omnizip", retained_ratio=0.25, **fields)
