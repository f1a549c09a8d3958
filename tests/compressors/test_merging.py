"""What methods that merge tokens mean, beyond golden vectors and the matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omnisieve.compressors import CompressorError, build_compressor
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
