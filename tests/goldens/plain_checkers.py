"""Checkers of the files that `plain.py` makes: published rules in plain steps."""

from __future__ import annotations

import torch

from omnisieve import build_compressor
from omnisieve.compressors.inner import InnerCompressor
from omnisieve.compressors.topdown import select_top_down
from omnisieve.layout import MEDIA, Modality
from tests.goldens.checkers import checks, counts
from tests.goldens.efficiency_checkers import one_frame
from tests.goldens.layouts import input_layout
from tests.goldens.merging_checkers import encoder_statistic
from tests.goldens.vectors import Vectors


@checks("visionzip_plain_")
def check_intact_visionzip(v: Vectors) -> None:
    arrays = v.related(v.given("inputs_file"))
    layout, embeds = input_layout(arrays), torch.from_numpy(arrays["inputs_embeds"])
    compressor = build_compressor("visionzip", rounding="official", retained_ratio=v.given("ratio"))
    needs = {need: encoder_statistic(need.kind, need.modality, arrays, layout) for need in compressor.needs}
    for modality in MEDIA:
        v.close(f"{modality.name.lower()}_ratio", torch.tensor(compressor.shares_of(modality, layout)[0, 0]))
    plan = compressor.plan(embeds, layout, needs)
    compressed = plan.apply(embeds)
    video = layout.mask(Modality.VIDEO)
    v.equal("kept_video", (plan.keep & video)[0].nonzero()[:, 0])
    v.close("kept_video_embeds", compressed.embeds[0, video[0, compressed.index[0]]])
    # Which audio goes where some must is left to chance.
    v.equal("audio_count", counts(plan.keep, layout.mask(Modality.AUDIO)))
    assert (plan.exact, plan.kept[0]) == (True, plan.keep.sum())


@checks("fastv_plain_")
def check_intact_fastv(v: Vectors) -> None:
    arrays = v.related(v.given("inputs_file"))
    layout, scores = input_layout(arrays), torch.from_numpy(arrays["llm_scores"])[None]
    compressor = build_compressor("fastv", rounding="official", retained_ratio=v.given("ratio"), k=2).for_depth(28)
    behind = compressor.at(retained_ratio=compressor.behind(v.given("ratio")))
    for modality in MEDIA:
        v.close(f"{modality.name.lower()}_ratio", torch.tensor(behind.shares_of(modality, layout)[0, 0]))
    video, audio = (layout.mask(modality) for modality in MEDIA)
    keep = compressor.keep_after(0, scores, video | audio, layout)
    v.equal("kept_video", (keep & video)[0].nonzero()[:, 0])
    v.equal("audio_count", counts(keep, audio))
    assert compressor.counts(layout)[0, 0] == keep.sum()
    if counts(keep, audio) < counts(audio, audio):
        other = compressor.at(seed=1).keep_after(0, scores, video | audio, layout)
        assert not torch.equal(other & audio, keep & audio), "audio goes by chance"


@checks("seats_plain_runs_")
def check_runs(v: Vectors) -> None:
    layout = input_layout(v.related(v.given("inputs_file")))
    media = layout.mask(*MEDIA)
    alive, kept = v.given("alive")[None] & media, []
    for scores, ratio in zip(v.given("scores"), v.given("ratios").tolist(), strict=True):
        present = torch.stack([(alive & layout.mask(m)).sum(dim=1) for m in MEDIA], dim=1)
        wanted = (present.double() * ratio).round().long().clamp(min=1)
        scores = scores[None].masked_fill(~alive, 0)
        alive = select_top_down(scores, alive, layout, wanted, tau=v.given("tau"), official=True)
        kept.append((alive | ~media)[0])
    v.equal("keep", torch.stack(kept))


@checks("plain_counts")
def check_counts(v: Vectors) -> None:
    for name in (name for name in v.names("") if "|" in name):
        method, asked, *sizes = name.split("|")
        ratios = [float(ratio) for ratio in asked.split(",")]
        names = ("retained_ratio",) if len(ratios) == 1 else ("video_ratio", "audio_ratio")
        layout = one_frame(*map(int, sizes))
        compressor = build_compressor(method, rounding="official", **dict(zip(names, ratios, strict=True)))
        if isinstance(compressor, InnerCompressor):
            everything = torch.ones(1, layout.length)
            keep = compressor.for_depth(28).keep_after(0, everything, layout.mask(*MEDIA), layout)
            v.equal(name, [counts(keep, layout.mask(modality)) for modality in MEDIA])
        else:
            budget = compressor.budget(layout)
            v.equal(name, [budget.video[0], budget.audio[0]])
