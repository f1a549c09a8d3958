"""What methods that merge tokens mean, beyond golden vectors and the matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omnisieve.compressors import CompressorError, build_compressor
from omnisieve.compressors.dash_segments import AudioCuts, heard_at, segments_of_frames
from omnisieve.layout import Modality, TokenLayout
from omnisieve.plan import Plan
from tests.layouts import LayoutSpec, make_layout

WIDE = LayoutSpec(windows=4, rows=4, columns=6, audio_per_window=20)


def noise(layout: TokenLayout, *width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(layout.batch_size, layout.length, *width, generator=torch.Generator().manual_seed(seed))


class TestVisionZip:
    def plan(self, layout: TokenLayout, name: str = "visionzip_om", keys=None, attention=None, **fields) -> Plan:
        compressor = build_compressor(name, **fields)
        keys = noise(layout, 8, seed=1) if keys is None else keys
        attention = noise(layout, seed=2).exp() if attention is None else attention
        needs = {need: keys if need.kind == "keys" else attention for need in compressor.needs}
        return compressor.plan(noise(layout, 12), layout, needs)

    def test_most_attended_tokens_stay(self) -> None:
        layout = make_layout(LayoutSpec(audio=False))
        attention = noise(layout, seed=2).exp()
        frames = layout.segments("frame", Modality.VIDEO)
        loud = frames.index[0, :, 5]
        attention[0, loud] += 100
        assert self.plan(layout, attention=attention, retained_ratio=0.2).keep[0, loud].all()

    def test_an_anchor_gains_the_mean_of_what_has_its_key(self) -> None:
        """One frame with one anchor: all that goes joins it, and its own embedding stays whole."""
        layout = make_layout(LayoutSpec(windows=1, grids_per_window=1, audio=False))
        x, plan = noise(layout, 12), self.plan(layout, retained_ratio=4 / 16)
        video = layout.mask(Modality.VIDEO)[0]
        merged = plan.merge.apply(x)[0]
        changed = (merged != x[0]).any(dim=-1)
        assert changed.sum() == 1
        assert plan.keep[0, changed].all()
        torch.testing.assert_close(merged[changed][0], x[0, changed][0] + x[0, video & ~plan.keep[0]].mean(dim=0))

    def test_tokens_join_the_anchor_of_the_nearest_key(self) -> None:
        layout = make_layout(LayoutSpec(windows=1, grids_per_window=1, rows=8, columns=8, audio=False))
        video = layout.segments("all", Modality.VIDEO).index[0, 0]
        keys = torch.zeros(1, layout.length, 8)
        # Attention keeps the last tokens; anchors are the first of the rest and others at equal steps.
        attention = torch.arange(layout.length).float()[None]
        plan = self.plan(layout, attention=attention, keys=keys, retained_ratio=16 / 64)
        anchors = video[:-13][plan.keep[0, video[:-13]]]
        assert anchors.tolist() == video[[0, 17, 34]].tolist()
        groups = torch.arange(layout.length) % 3
        groups[anchors] = torch.arange(3)
        keys = torch.eye(8)[groups][None]
        merge = self.plan(layout, attention=attention, keys=keys, retained_ratio=16 / 64).merge
        assert torch.equal(merge.target[0], anchors[groups[merge.source[0]]])
        assert sorted(merge.source[0].tolist()) == sorted(set(video[:-13].tolist()) - set(anchors.tolist()))
        for group in range(3):
            assert merge.weight[0, groups[merge.source[0]] == group].sum() == pytest.approx(1)

    @pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 0.97])
    def test_anchors_are_part_of_the_budget_and_never_idle(self, ratio: float) -> None:
        layout = make_layout(WIDE, LayoutSpec(windows=5, odd_grids=True))
        compressor = build_compressor("visionzip_om", retained_ratio=ratio)
        for modality in (Modality.VIDEO, Modality.AUDIO):
            sizes, kept = compressor.segments_of(modality, layout).sizes, compressor.counts_of(modality, layout)
            dominant, contextual = compressor.split_counts(modality, layout)
            np.testing.assert_array_equal(dominant + contextual, kept)
            assert (dominant >= np.minimum(kept, 1)).all()
            assert (contextual <= sizes - kept).all()
            assert (contextual >= 0).all()

    def test_without_anchors_nothing_is_merged(self) -> None:
        assert self.plan(make_layout(WIDE), retained_ratio=0.25, contextual_ratio=0.0).merge is None

    def test_audio_stays_whole_while_the_video_can_pay(self) -> None:
        layout = make_layout(WIDE)  # 192 video and 80 audio tokens
        measured = self.plan(layout, "visionzip", retained_ratio=0.5).measured(layout)
        assert (measured["video"], measured["audio"]) == (56, 80)

    def test_audio_goes_by_chance_where_it_cannot(self) -> None:
        layout = make_layout(WIDE)
        plans = [self.plan(layout, "visionzip", retained_ratio=0.2, seed=seed) for seed in (0, 0, 1)]
        measured = plans[0].measured(layout)
        # A twentieth of the video stays.
        assert (measured["video"], measured["audio"]) == (10, 44)
        audio = layout.mask(Modality.AUDIO)
        same, other = ((plans[0].keep == plan.keep)[audio].all() for plan in plans[1:])
        assert same
        assert not other
        assert torch.equal(plans[0].keep[~audio], plans[2].keep[~audio])

    def test_a_pair_of_ratios_is_taken_as_it_is(self) -> None:
        layout = make_layout(WIDE)
        measured = self.plan(layout, "visionzip", video_ratio=0.25, audio_ratio=0.5).measured(layout)
        assert (measured["video"], measured["audio"]) == (48, 40)

    def test_intact_audio_needs_no_audio_encoder(self) -> None:
        compressor = build_compressor("visionzip", retained_ratio=0.5)
        assert {need.modality for need in compressor.needs} == {Modality.VIDEO}

    @pytest.mark.parametrize(
        ("name", "fields"),
        [
            ("visionzip_om", {"contextual_ratio": 1.2}),
            ("visionzip", {"video_floor": 0.0}),
            ("visionzip_om", {"seed": 1}),
        ],
    )
    def test_settings_that_cannot_be_are_refused(self, name: str, fields: dict) -> None:
        with pytest.raises(CompressorError, match=str(next(iter(fields)))):
            build_compressor(name, retained_ratio=0.25, **fields)


class TestDash:
    """Sound that changes at given tokens, and video of noise."""

    def sounds(self, layout: TokenLayout, changes: list[int]) -> torch.Tensor:
        """Embeddings whose audio turns by a right angle at each of the tokens `changes`."""
        x = noise(layout, 12)
        audio = layout.segments("all", Modality.AUDIO)
        at = audio.index[0, 0, : int(audio.sizes[0, 0])]
        kind = torch.zeros(len(at), dtype=torch.long).scatter(0, torch.tensor(changes), 1).cumsum(0)
        x[0, at] = torch.eye(12)[kind] + 0.02 * x[0, at]
        return x

    def plan(self, layout: TokenLayout, x: torch.Tensor, attention: torch.Tensor | None = None, **fields) -> Plan:
        compressor = build_compressor("dash", **fields)
        attention = torch.ones(1, layout.length) if attention is None else attention
        return compressor.plan(x, layout, {compressor.needs[0]: attention})

    def frame_counts(self, layout: TokenLayout, plan: Plan) -> torch.Tensor:
        frames = layout.segments("frame", Modality.VIDEO)
        return (frames.gather(plan.keep) & frames.valid).sum(dim=-1)[0]

    def cuts(self, layout: TokenLayout, x: torch.Tensor) -> AudioCuts:
        return build_compressor("dash", retained_ratio=0.3).audio_cuts(x, layout)

    def test_audio_is_cut_where_it_changes_but_not_too_soon(self) -> None:
        layout = make_layout(LayoutSpec(windows=4, audio_per_window=25))
        cuts = self.cuts(layout, self.sounds(layout, [10, 40, 60, 69, 99]))
        assert cuts.starts[0, 0].nonzero()[:, 0].tolist() == [0, 40, 99]

    def test_every_audio_item_is_cut_for_itself(self) -> None:
        layout = make_layout(LayoutSpec(windows=2, videos=2, audio_per_window=25))
        cuts = self.cuts(layout, self.sounds(layout, [35, 60, 85]))
        assert [item.nonzero()[:, 0].tolist() for item in cuts.starts[0]] == [[0, 35], [0, 35]]
        assert cuts.segment()[0, :, [0, 34, 35, 49]].tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]

    def test_a_frame_belongs_to_what_sounds_in_its_middle(self) -> None:
        """Frames of 25 positions, audio tokens of 2: the cut at token 31 is at 62, just before the third's middle."""
        layout = make_layout(LayoutSpec(windows=2, audio_per_window=25))
        for cut, expected in ((31, [0, 0, 1, 1]), (32, [0, 0, 0, 1])):
            cuts = self.cuts(layout, self.sounds(layout, [cut]))
            segment, first, odd = segments_of_frames(cuts, layout)
            assert segment[0].tolist() == expected
            assert first[0].tolist() == [True, *(np.diff(expected) == 1)]
        assert odd[0].tolist() == [False, True, False, False]

    def test_only_the_clock_of_the_video_counts(self) -> None:
        separate, own, silent = (
            make_layout(spec) for spec in (LayoutSpec(separate_audio=True), LayoutSpec(), LayoutSpec(audio=False))
        )
        assert (heard_at(separate) == -1).all()
        assert (heard_at(silent) == -1).all()
        heard = heard_at(own)[0]
        assert (own.modality[0, heard] == Modality.AUDIO).all()
        assert own.window[0, heard].tolist() == [0, 0, 1, 1, 2, 2]

    def test_a_segment_that_keeps_more_audio_keeps_more_video(self) -> None:
        layout = make_layout(LayoutSpec(windows=4, rows=8, columns=8, audio_per_window=20))
        x = self.sounds(layout, [40])
        audio = layout.segments("all", Modality.AUDIO).index[0, 0]
        attention = torch.ones(1, layout.length)
        attention[0, audio[40:]] += 1
        kept = self.frame_counts(
            layout, self.plan(layout, x, attention, retained_ratio=0.3, scope="file", guidance=0.2)
        )
        assert kept[:4].max() < kept[4:].min()
        assert kept.sum() == round(0.3 * 8 * 64)
        even = self.frame_counts(
            layout, self.plan(layout, x, attention, retained_ratio=0.3, scope="file", guidance=0.0)
        )
        assert even.max() - even.min() <= 1

    def test_a_bonus_goes_to_the_first_frames_of_segments(self) -> None:
        layout = make_layout(LayoutSpec(windows=4, rows=8, columns=8, audio_per_window=20))
        x = self.sounds(layout, [40])
        plain, bonus = (
            self.frame_counts(layout, self.plan(layout, x, retained_ratio=0.3, guidance=0.0, boundary_bonus=b))
            for b in (0.0, 0.5)
        )
        assert bonus.sum() == plain.sum()
        assert (bonus - plain).topk(2).indices.sort().values.tolist() == [0, 4]

    def test_odd_frames_keep_what_changed(self) -> None:
        layout = make_layout(LayoutSpec(windows=2, audio=False))
        x = noise(layout, 12)
        frames = layout.segments("frame", Modality.VIDEO).index[0]
        x[0, frames[1]] = x[0, frames[0]]
        x[0, frames[1, [2, 9]]] *= -1
        keep = self.plan(layout, x, retained_ratio=2 / 16).keep[0]
        assert keep[frames[1]].nonzero()[:, 0].tolist() == [2, 9]

    def test_published_rate_of_a_silent_video(self) -> None:
        """Half grids of 24 tokens, of which max(0.35, 0.7 - 0.15) go."""
        layout = make_layout(LayoutSpec(windows=2, rows=6, columns=8, audio=False))
        plan = self.plan(layout, noise(layout, 12), retained_ratio=0.3, rounding="official")
        assert not plan.exact
        assert plan.measured(layout)["video"] == 8 * int(24 * 0.45)

    def test_published_segments_lose_what_fills_no_frame(self) -> None:
        """Cut at 40 of 100 audio tokens: the first segment has 38 of 96 video tokens: three half grids and 2."""
        layout = make_layout(LayoutSpec(windows=4, grids_per_window=1, rows=4, columns=6, audio_per_window=25))
        plan = self.plan(layout, self.sounds(layout, [40]), video_ratio=0.9, audio_ratio=1.0, rounding="official")
        video = layout.segments("all", Modality.VIDEO).index[0, 0]
        kept = plan.keep[0, video]
        assert not kept[36:38].any()
        assert not kept[38 + 48 : 96].any()
        assert kept[:36].any()

    @pytest.mark.parametrize(
        "fields",
        [
            {"threshold": 1.5},
            {"guidance": -0.1},
            {"boundary_bonus": 2.0},
            {"min_segment": 0},
            {"boundary_bonus": 0.3, "rounding": "official"},
        ],
    )
    def test_settings_that_cannot_be_are_refused(self, fields: dict) -> None:
        with pytest.raises(CompressorError, match=next(iter(fields))):
            build_compressor("dash", retained_ratio=0.25, **fields)
