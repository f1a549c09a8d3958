"""Which budgets ratios ask for, and which of them a method can reach."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnisieve.compressors import Compressor, CompressorError, Settings, UnreachableRatioError
from omnisieve.layout import Modality, TokenLayout
from tests.layouts import LayoutSpec, make_layout

AUDIO_VIDEO = LayoutSpec(windows=2, rows=4, columns=5, audio_per_window=10)  # 80 video, 20 audio


class Intact(Compressor):
    """Leaves audio whole and keeps three video tokens at least."""

    name = "intact"
    audio_intact = True

    def least(self, modality: Modality, layout: TokenLayout) -> np.ndarray:
        return np.minimum(layout.counts(modality), 3 if modality == Modality.VIDEO else 0)


def budget(layout: TokenLayout, **ratios: float) -> tuple[list[int], list[int]]:
    asked = Intact(Settings(**ratios)).asked(layout)
    return asked.video.tolist(), asked.audio.tolist()


def test_video_pays_for_both() -> None:
    layout = make_layout(AUDIO_VIDEO, LayoutSpec(windows=1, audio=False, rows=5, columns=5))
    assert budget(layout, retained_ratio=0.5) == ([30, 25], [20, 0])
    shares = Intact(Settings(retained_ratio=0.5)).shares_of(Modality.VIDEO, layout)
    np.testing.assert_allclose(shares, [[30 / 80], [0.5]])


def test_given_ratios_are_kept() -> None:
    layout = make_layout(AUDIO_VIDEO)
    assert budget(layout, video_ratio=0.25, audio_ratio=0.5) == ([20], [10])
    assert budget(layout, retained_ratio=0.25, audio_ratio=0.5) == ([15], [10])
    assert budget(layout, retained_ratio=0.25, video_ratio=0.1) == ([8], [17])


@given(retained=st.floats(0.01, 1), rows=st.integers(1, 6), audio=st.integers(1, 30))
def test_the_total_is_met_or_the_message_says_what_can_be(retained: float, rows: int, audio: int) -> None:
    """Asking again for the lower end of the range that the error names gives the least."""
    layout = make_layout(LayoutSpec(windows=1, rows=rows, columns=5, audio_per_window=audio))
    video = int(layout.counts(Modality.VIDEO)[0])
    total = max(round(retained * (video + audio)), 1)
    if total - audio >= 3:
        assert budget(layout, retained_ratio=retained) == ([total - audio], [audio])
        return
    with pytest.raises(UnreachableRatioError, match="retained_ratio") as error:
        budget(layout, retained_ratio=retained)
    lowest = float(str(error.value).split("reachable are ")[1].split(" to")[0])
    assert budget(layout, retained_ratio=lowest) == ([3], [audio])


def test_audio_alone_stays_whole_or_is_refused() -> None:
    layout = make_layout(AUDIO_VIDEO, LayoutSpec(video=False))
    with pytest.raises(UnreachableRatioError, match=r"sample 1 would keep -15 of its 0 .* reachable are 1\.0 to 1\.0"):
        budget(layout, retained_ratio=0.5)
    with pytest.raises(UnreachableRatioError, match=r"sample clip-8 would keep"):
        budget(replace(layout, names=("clip-7", "clip-8")), retained_ratio=0.5)
    assert budget(layout, retained_ratio=1.0) == ([80, 0], [20, 30])


def test_a_ratio_below_the_least_is_refused() -> None:
    with pytest.raises(UnreachableRatioError, match=r"would keep 2 of its 80 .* are 0\.0375 to 1\.0 \(video_ratio\)"):
        budget(make_layout(AUDIO_VIDEO), video_ratio=0.02, audio_ratio=1.0)


def test_one_ratio_too_many_or_too_few_is_refused() -> None:
    with pytest.raises(CompressorError, match="leave one out"):
        Settings(retained_ratio=0.5, video_ratio=0.5, audio_ratio=0.5)
    with pytest.raises(CompressorError, match="given alone"):
        Settings(audio_ratio=0.5)
