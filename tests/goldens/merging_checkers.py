"""Checkers of methods that merge dropped tokens into kept ones: VisionZip and DASH."""

from __future__ import annotations

import numpy as np
import torch

from omnisieve import build_compressor
from omnisieve.compressors.dash_segments import half_grids
from omnisieve.compressors.visionzip import zip_tokens
from omnisieve.layout import Modality, TokenLayout
from omnisieve.ops.clustering import uniqueness
from tests.goldens.checkers import checks, kept, merge_lists
from tests.goldens.layouts import input_layout
from tests.goldens.vectors import Vectors


def spread(values: np.ndarray, mask: torch.Tensor) -> torch.Tensor:
    """Values of one modality's tokens, [n] or [n, d], as [1, S] or [1, S, d]."""
    out = torch.zeros(*mask.shape, *values.shape[1:])
    out[mask] = torch.from_numpy(values)
    return out


def encoder_statistic(
    kind: str, modality: Modality, arrays: dict[str, np.ndarray], layout: TokenLayout
) -> torch.Tensor:
    """What the inputs of a file hold of a need."""
    name = modality.name.lower()
    values = arrays[f"{name}_key"][0] if kind == "keys" else arrays[f"{name}_attn"]
    return spread(values, layout.mask(modality))


@checks("visionzip_")
def check_visionzip(v: Vectors) -> None:
    arrays = v.related(v.given("inputs_file"))
    layout = input_layout(arrays)
    compressor = build_compressor(
        "visionzip_om",
        rounding="official",
        video_ratio=v.given("video_ratio"),
        audio_ratio=v.given("audio_ratio"),
        contextual_ratio=v.given("contextual_ratio"),
    )
    frames, cuts = (compressor.segments_of(m, layout).sizes.max() for m in (Modality.VIDEO, Modality.AUDIO))
    v.equal("grid_in_window", frames // layout.segments("frame", Modality.VIDEO).sizes.max())
    assert cuts <= v.given("audio_window_tokens")
    needs = {need: encoder_statistic(need.kind, need.modality, arrays, layout) for need in compressor.needs}
    embeds = torch.from_numpy(arrays["inputs_embeds"])
    plan = compressor.plan(embeds, layout, needs)
    compressed = plan.apply(embeds)
    # Either mask keeps whatever is not of its modality.
    v.equal("video_mask", (plan.keep | ~layout.mask(Modality.VIDEO))[0])
    v.equal("audio_mask", (plan.keep | ~layout.mask(Modality.AUDIO))[0])
    v.equal("kept_index", compressed.index[0])
    v.close("kept_embeds", compressed.embeds[0])
    assert plan.exact
    v.equal("stable_fp64", 1)


@checks("visionzip_official_")
def check_visionzip_picture(v: Vectors) -> None:
    """CLIP's CLS token is kept, the rest is one segment; contextual tokens come last."""
    hidden, keys = v.given("hidden"), v.given("metric")
    attention = v.given("cls_attention").sum(dim=1)
    dominant, contextual = v.given("dominant"), v.given("contextual")
    patches = hidden.shape[1] - 1
    part = zip_tokens(
        attention[:, 1:],
        keys[:, 1:],
        torch.ones(1, patches, dtype=torch.bool),
        *(np.array([n]) for n in (patches, dominant, contextual)),
    )
    best_first = attention[:, 1:].argsort(dim=-1, descending=True)[:, :dominant]
    v.equal("all_indices", torch.cat([torch.zeros(1, 1, dtype=torch.long), best_first + 1], dim=1))
    tokens = hidden[0, 1:]
    zipped = tokens.index_add(0, part.target[0], tokens * part.weight[0, :, None])
    keep = part.keep[0]
    is_dominant = torch.zeros_like(keep).scatter(0, best_first[0], True)
    assert (keep & is_dominant).sum() == dominant
    v.close("out", torch.cat([hidden[0, :1], zipped[is_dominant], zipped[keep & ~is_dominant]])[None])


@checks("dash_")
def check_dash(v: Vectors) -> None:
    arrays = v.related(v.given("inputs_file"))
    layout = input_layout(arrays)
    compressor = build_compressor(
        "dash",
        rounding="official",
        video_ratio=kept(v.given("rho_video")),
        audio_ratio=kept(v.given("rho_audio")),
        merge_group=v.given("g"),
        contextual_ratio=v.given("contextual_ratio"),
    )
    v.equal("num_input_frames", 2 * arrays["video_grid_thw"][0, 0])
    embeds, audio = torch.from_numpy(arrays["inputs_embeds"]), layout.mask(Modality.AUDIO)
    plan = compressor.plan(embeds, layout, {compressor.needs[0]: spread(arrays["audio_attn"], audio)})
    v.equal("keep_mask", plan.keep[0])
    v.equal("audio_keep", plan.keep[audio])
    v.close("audio_embeds_out", plan.merge.apply(embeds)[audio])
    anchors = int(np.rint(v.given("contextual_ratio") * int(audio.sum())))
    merges = merge_lists(plan, audio[0], anchors)
    for name, actual in zip(("merge_anchor", "merge_len", "merge_members"), merges, strict=True):
        v.equal(name, actual)

    cuts = compressor.audio_cuts(embeds, layout)
    boundary = cuts.boundary[0, 0]
    v.close("boundary_prob", boundary)
    v.equal("boundary_mask_half", boundary > 0.5)
    v.close("cos_sim", 1 - 2 * boundary[1:])
    v.equal("audio_boundaries", ends(cuts.starts[0, 0]))
    v.equal("video_boundaries", ends(half_grids(cuts.starts[:, 0], layout).starts[0]))
    tokens = embeds[audio]
    v.close("uniqueness", uniqueness(tokens, torch.ones(len(tokens), dtype=torch.bool)))
    v.equal("stable_fp64", 1)


def ends(starts: torch.Tensor) -> np.ndarray:
    """First entries of segments, and the end of the last."""
    return np.append(starts.nonzero()[:, 0].numpy(), len(starts))
