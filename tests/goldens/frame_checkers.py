"""Checkers of methods that go through a video frame by frame: DyCoke and FastVID."""

from __future__ import annotations

import torch

from omnisieve import build_compressor
from tests.goldens.checkers import checks
from tests.goldens.layouts import video_layout
from tests.goldens.vectors import Vectors


@checks("dycoke_")
def check_dycoke(v: Vectors) -> None:
    features, patches, removed = v.given("features"), v.given("num_tokens_per_frame"), v.given("merging_ratio")
    compressor = build_compressor("dycoke", rounding="official", video_ratio=1 - 0.75 * removed, audio_ratio=1.0)
    plan = compressor.plan(features[None], video_layout(len(features) // patches, patches))
    keep = plan.keep[0]
    v.equal("kept_sorted", keep.nonzero()[:, 0])
    assert (plan.exact, plan.kept[0]) == (True, keep.sum())
    # Published code lists a pruned frame by rising cosine, a whole one as it is.
    by_frame = keep.reshape(-1, patches)
    rank = torch.where(by_frame.all(-1, keepdim=True), -torch.arange(patches), plan.scores.reshape(-1, patches))
    order = rank.masked_fill(~by_frame, -torch.inf).argsort(dim=-1, descending=True)
    listed = (order + patches * torch.arange(len(order)).unsqueeze(-1))[
        torch.arange(patches) < by_frame.sum(-1)[:, None]
    ]
    v.equal("kept_in_output_order", listed)
    v.equal("stable_fp64", 1)
