"""Checkers of methods that merge dropped tokens into kept ones: VisionZip and DASH."""

from __future__ import annotations

import numpy as np
import torch

from omnisieve import build_compressor
from omnisieve.compressors.visionzip import zip_tokens
from omnisieve.layout import Modality, TokenLayout
from tests.goldens.checkers import checks
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
    kept = plan.apply(embeds)
    # Either mask keeps whatever is not of its modality.
    v.equal("video_mask", (plan.keep | ~layout.mask(Modality.VIDEO))[0])
    v.equal("audio_mask", (plan.keep | ~layout.mask(Modality.AUDIO))[0])
    v.equal("kept_index", kept.index[0])
    v.close("kept_embeds", kept.embeds[0])
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
