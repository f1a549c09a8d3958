"""Checkers of methods that go through a video frame by frame: DyCoke and FastVID."""

from __future__ import annotations

import torch

from omnisieve import build_compressor
from omnisieve.layout import Modality
from omnisieve.ops.clustering import density_peaks_with_itself
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


@checks("fastvid_")
def check_fastvid(v: Vectors) -> None:
    """Both variants; what only one of them wrote down is compared where it is there."""
    video = v.given("video")
    text = v.given("n_pre"), v.given("n_post")
    names = v.names("")
    fields = {"still_similarity": v.given("ignore"), "variant": "qwen"} if "ignore" in names else {}
    compressor = build_compressor(
        "fastvid",
        rounding="official",
        video_ratio=v.given("ratio"),
        audio_ratio=1.0,
        scenes=v.given("c"),
        scene_similarity=v.given("tau"),
        context_ratio=v.given("d"),
        anchor_interval=v.given("p"),
        least_own=v.given("alpha"),
        **fields,
    )
    layout = video_layout(*video.shape[:2], text=text)
    frames = layout.segments("frame", Modality.VIDEO)
    before, after = torch.zeros(text[0], video.shape[2]), torch.ones(text[1], video.shape[2])
    embeds = torch.cat([before, video.flatten(0, 1), after])[None]
    attention = torch.nn.functional.pad(v.given("frame_attn").flatten(), text)[None]
    plan = compressor.plan(embeds, layout, {compressor.needs[0]: attention})
    v.equal("keep_index", plan.keep[0].nonzero()[:, 0])
    kept = int(plan.keep.sum())
    v.close("tokens", plan.apply(embeds).embeds[0, :kept])
    assert kept <= plan.kept[0]

    v.close("frame_global", video.mean(dim=1))
    scenes = compressor.scenes_of(video[None], frames, layout)
    v.equal("segment_sizes", scenes.of[0].bincount())
    if "density_score" in names:
        salient, context = (counts[0] for counts in compressor.split(scenes, frames, layout))
        v.equal("context_per_frame", context.int())
        v.equal("salient_per_frame", salient.unique().item())
        rest = v.given("frame_attn").argsort(dim=-1).argsort(dim=-1) < video.shape[1] - salient.unsqueeze(-1)
        score = density_peaks_with_itself(video, rest, neighbours=4).exp()
        v.close("density_score", score[rest].reshape(len(video), -1))
    v.equal("stable_fp64", 1)
