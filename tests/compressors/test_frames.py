"""What DyCoke and FastVID mean, beyond golden vectors and the matrix."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch

from omnisieve.compressors import CompressorError, UnreachableRatioError, build_compressor
from omnisieve.layout import Modality, TokenLayout, TokenMap
from tests.compressors.fastvid_reference import prune
from tests.layouts import LayoutSpec, make_layout, make_map

FOUR_FRAMES = LayoutSpec(windows=2, audio=False)  # of 16 tokens each


def embeddings(layout: TokenLayout, seed: int = 0) -> torch.Tensor:
    return torch.randn(layout.batch_size, layout.length, 12, generator=torch.Generator().manual_seed(seed))


class TestDyCoke:
    def test_frames_keep_what_changed(self) -> None:
        """Compared are: the second with the first, the third with the first, the fourth with the whole third."""
        layout = make_layout(FOUR_FRAMES)
        first, second, third, fourth = layout.segments("frame", Modality.VIDEO).index[0]
        x = embeddings(layout)
        x[0, second] = x[0, third] = x[0, first]
        x[0, second[[3, 7]]] *= -1
        x[0, third[[0, 7]]] *= -1
        x[0, fourth] = x[0, third]
        x[0, fourth[[5, 9]]] *= -1
        keep = build_compressor("dycoke", retained_ratio=(16 + 3 * 2) / 64).plan(x, layout).keep[0]
        assert keep[first].all()
        kept = [keep[frame].nonzero()[:, 0].tolist() for frame in (second, third, fourth)]
        assert kept == [[3, 7], [0, 7], [5, 9]]

    def test_groups_begin_anew_with_every_video(self) -> None:
        layout = make_layout(LayoutSpec(windows=3, videos=2, audio=False))
        keep = build_compressor("dycoke", retained_ratio=0.4).plan(embeddings(layout), layout).keep[0]
        frames = layout.segments("frame", Modality.VIDEO)
        whole = [bool(keep[frame].all()) for frame in frames.index[0]]
        assert whole == [True, False, False, False, True, False] * 2

    def test_audio_stays_whole_unless_asked_otherwise(self) -> None:
        layout = make_layout(LayoutSpec())
        audio = layout.mask(Modality.AUDIO)
        keep = {
            name: build_compressor("dycoke", **ratios).plan(embeddings(layout), layout).keep[audio]
            for name, ratios in {
                "whole": {"retained_ratio": 0.7},
                "random": {"video_ratio": 0.5, "audio_ratio": 0.5},
                "other seed": {"video_ratio": 0.5, "audio_ratio": 0.5, "seed": 1},
            }.items()
        }
        assert keep["whole"].all()
        assert keep["random"].sum() == keep["other seed"].sum() == 15
        assert not torch.equal(keep["random"], keep["other seed"])

    def test_windows_of_audio_are_compared_offset_by_offset(self) -> None:
        layout = make_layout(LayoutSpec(windows=2, video=False, audio_per_window=8))
        windows = layout.segments("window", Modality.AUDIO).index[0]
        x = embeddings(layout)
        x[0, windows[1]] = x[0, windows[0]]
        x[0, windows[1, [2, 6]]] *= -1
        keep = build_compressor("dycoke_va", retained_ratio=10 / 16).plan(x, layout).keep[0]
        assert keep[windows[0]].all()
        assert keep[windows[1]].nonzero()[:, 0].tolist() == [2, 6]

    def test_what_has_no_counterpart_counts_as_changed(self) -> None:
        """The first window is three tokens short."""
        tokens = make_map(LayoutSpec(windows=2, video=False, audio_per_window=8))
        audio = np.nonzero(tokens.modality == Modality.AUDIO)[0]
        layout = TokenLayout.stack([TokenMap(*(np.delete(f, audio[5:8]) for f in astuple(tokens)))])
        windows = layout.segments("window", Modality.AUDIO).index[0]
        x = embeddings(layout)
        x[0, windows[1, :5]] = x[0, windows[0, :5]]
        x[0, windows[1, 5:]] = x[0, windows[0, 4]].clone()
        keep = build_compressor("dycoke_va", retained_ratio=8 / 13).plan(x, layout).keep[0]
        assert keep[windows[1]].nonzero()[:, 0].tolist() == [5, 6, 7]

    def test_published_function_and_the_end_of_a_video(self) -> None:
        """The third frame of the last four stays whole, an odd last frame goes, a lone frame stays."""
        ratios = {"video_ratio": 0.25 + 0.75 * 0.5, "audio_ratio": 1.0, "rounding": "official"}
        kept = {}
        for grids in (1, 5, 8):
            layout = make_layout(LayoutSpec(windows=1, grids_per_window=grids, audio=False))
            keep = build_compressor("dycoke", **ratios).plan(embeddings(layout), layout).keep[0]
            kept[grids] = keep[layout.segments("frame", Modality.VIDEO).index[0]].sum(-1).tolist()
        assert kept == {1: [16], 5: [16, 8, 8, 8, 0], 8: [16, 8, 8, 8, 16, 8, 16, 8]}

    @pytest.mark.parametrize("rounding", ["exact", "official"])
    def test_less_than_a_quarter_is_refused(self, rounding: str) -> None:
        layout = make_layout(FOUR_FRAMES)
        with pytest.raises(UnreachableRatioError, match=r"dycoke: .* keep 16 to 64, so reachable are 0\.25 to 1\.0"):
            build_compressor("dycoke", retained_ratio=0.2, rounding=rounding).plan(embeddings(layout), layout)


class TestFastVid:
    def plan(self, layout: TokenLayout, x: torch.Tensor, attention: torch.Tensor | None = None, **fields):
        compressor = build_compressor("fastvid", **fields)
        if attention is None:
            attention = torch.rand(1, layout.length, generator=torch.Generator().manual_seed(2)) + 0.1
        return compressor.plan(x, layout, {compressor.needs[0]: attention})

    @pytest.mark.parametrize("variant", ["llava", "qwen"])
    @pytest.mark.parametrize(("frames", "scenes", "ratio"), [(19, 3, 0.35), (12, 1, 0.25), (7, 2, 0.2), (1, 1, 0.3)])
    def test_published_functions_step_by_step(self, variant: str, frames: int, scenes: int, ratio: float) -> None:
        layout = make_layout(LayoutSpec(windows=1, grids_per_window=frames, rows=3, columns=6, audio=False, text=0))
        x = torch.zeros(1, layout.length, 8)
        index = layout.segments("frame", Modality.VIDEO).index[0]
        generator = torch.Generator().manual_seed(frames)
        video, attention = (
            torch.randn(*index.shape, 8, generator=generator),
            torch.rand(index.shape, generator=generator),
        )
        spread = torch.zeros(1, layout.length)
        x[0, index], spread[0, index] = video, attention
        kept, merged = prune(video, attention, variant, ratio, scenes, still=0.2, d=0.4, p=4, own=0.6)
        fields = {"scenes": scenes, "scene_similarity": -1.0, "still_similarity": 0.2}
        plan = self.plan(
            layout, x, spread, variant=variant, video_ratio=ratio, audio_ratio=1.0, rounding="official", **fields
        )
        own = plan.keep[0, index].flatten()
        assert own.nonzero()[:, 0].tolist() == kept
        torch.testing.assert_close(plan.merge.apply(x)[0, index].flatten(0, 1)[own], merged[own], rtol=0, atol=2e-5)

    def test_scenes_end_where_the_picture_changes_and_where_the_video_does(self) -> None:
        layout = make_layout(LayoutSpec(windows=4, videos=2, audio=False))  # two videos of 8 frames
        frames = layout.segments("frame", Modality.VIDEO)
        x = torch.zeros(1, layout.length, 12)
        for frame, kind in zip(frames.index[0], [0, 0, 0, 1, 1, 1, 1, 1] + [1] * 8, strict=True):
            x[0, frame, kind] = 1.0
        compressor = build_compressor("fastvid", retained_ratio=0.25, scenes=1)
        assert compressor.scenes_of(frames.gather(x), frames, layout).of.tolist() == [[0] * 3 + [1] * 5 + [2] * 8]

    def test_still_frames_give_their_share_to_the_last_of_them(self) -> None:
        """Variant "qwen": of eight equal frames the last keeps what it has room for, half of it context."""
        layout = make_layout(LayoutSpec(windows=4, audio=False))  # 8 frames of 16 tokens
        frames = layout.segments("frame", Modality.VIDEO)
        x = embeddings(layout)
        x[0, frames.index[0]] = x[0, frames.index[0, 0]].clone()
        kept = {}
        for ratio in (12 / 128, 32 / 128):
            plan = self.plan(layout, x, variant="qwen", scenes=1, retained_ratio=ratio)
            kept[ratio] = plan.keep[0, frames.index[0]].sum(-1).tolist()
        # A quarter is more than one frame has: the others share the rest evenly.
        assert list(kept.values()) == [[0] * 7 + [12], [3, 3, 2, 2, 2, 2, 2, 16]]

    @pytest.mark.parametrize("variant", ["llava", "qwen"])
    def test_a_dropped_token_is_merged_once_within_its_scene(self, variant: str) -> None:
        layout = make_layout(LayoutSpec(windows=6, audio=False))
        x, frames = embeddings(layout), layout.segments("frame", Modality.VIDEO)
        compressor = build_compressor("fastvid", retained_ratio=0.25, variant=variant, scenes=3, scene_similarity=-1.0)
        plan = compressor.plan(x, layout, {compressor.needs[0]: torch.rand(1, layout.length)})
        scene = compressor.scenes_of(frames.gather(x), frames, layout).of
        scene = frames.scatter(scene.unsqueeze(-1).expand(frames.index.shape), -1)[0]
        merge, live = plan.merge, plan.merge.weight[0] > 0
        source, target = merge.source[0, live], merge.target[0, live]
        dropped = layout.mask(Modality.VIDEO)[0] & ~plan.keep[0]
        assert sorted(source[dropped[source]].tolist()) == dropped.nonzero()[:, 0].tolist()
        assert torch.equal(scene[source], scene[target])
        assert plan.keep[0, target].all()
        # A weighted mean: own share and the others' make one, and its own share is at least 0.6.
        mass = merge.own[0].scatter_add(0, merge.target[0], merge.weight[0])
        torch.testing.assert_close(mass[plan.keep[0]], torch.ones_like(mass[plan.keep[0]]))
        assert merge.own.min() >= 0.6

    def test_a_video_that_stays_whole_is_left_as_it_is(self) -> None:
        """Also beside one that does not."""
        layout = make_layout(LayoutSpec(windows=1, audio_per_window=2, grids_per_window=1), LayoutSpec(audio=False))
        x = embeddings(layout)
        attention = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(0))
        plan = self.plan(layout, x, attention, retained_ratio=0.98)
        assert plan.measured(layout)["video"].tolist() == [16, 94]
        torch.testing.assert_close(plan.merge.apply(x)[0], x[0], rtol=0, atol=0)

    @pytest.mark.parametrize(
        "fields",
        [{"variant": "paper"}, {"scenes": 0}, {"anchor_interval": 0}, {"context_ratio": 1.2}, {"least_own": -1}],
    )
    def test_settings_that_cannot_be_are_refused(self, fields: dict) -> None:
        with pytest.raises(CompressorError, match=str(next(iter(fields.values())))):
            build_compressor("fastvid", retained_ratio=0.25, **fields)
