"""What DyCoke means, beyond golden vectors and the matrix."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch

from omnisieve.compressors import UnreachableRatioError, build_compressor
from omnisieve.layout import Modality, TokenLayout, TokenMap
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
