"""`tools/tune_split.py`: both splits of a method have the same total budget."""

from __future__ import annotations

import pytest
from tools import tune_split

from omnisieve.evaluation.methods import resolve_methods
from omnisieve.layout import Modality, TokenLayout
from tests.layouts import LayoutSpec, make_map


def test_both_splits_keep_the_same_total() -> None:
    """The papers' split gives audio the larger share, out of the same total."""
    layout = TokenLayout.stack([make_map(LayoutSpec(audio_per_window=25))])
    video, audio = (int(layout.counts(m)[0]) for m in (Modality.VIDEO, Modality.AUDIO))
    share = tune_split.audio_share(0.25, video, audio)
    (method,) = resolve_methods(["random"], {})
    equal, papers = (m.build(0.25).budget(layout) for m in tune_split.splits(method, {0.25: share}))
    assert equal.total.tolist() == papers.total.tolist()
    assert papers.audio[0] / audio == pytest.approx(55 / 20 * papers.video[0] / video, rel=0.1)


def test_settings_name_only_what_the_papers_split_improves() -> None:
    methods = resolve_methods(["random", "stvp"], {"stvp": {"audio_novelty": 0.3}})
    found = {("random, equal", 0.25): 50.0, ("random, papers", 0.25): 50.0}
    found |= {("stvp, equal", 0.25): 50.0, ("stvp, papers", 0.25): 51.0}
    assert tune_split.best(methods, {0.25: 0.4}, found) == {"stvp": {"at": {0.25: {"audio_ratio": 0.4}}}}
    assert tune_split.splits(methods[1], {0.25: 0.4})[0].build(0.25).settings.audio_novelty == 0.3
