"""Checkers of methods that prune inside the LLM: the published selections, from given attention."""

from __future__ import annotations

import numpy as np
import torch

from omnisieve import build_compressor
from omnisieve.compressors.inner import InnerCompressor
from omnisieve.layout import MEDIA, Modality, TokenLayout, TokenMap
from tests.goldens.checkers import checks
from tests.goldens.layouts import input_layout
from tests.goldens.vectors import Vectors


def kept_after(compressor: InnerCompressor, scores: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """[S] bool, text included: what the first cut leaves of a whole sequence."""
    media = layout.mask(*MEDIA)
    keep = compressor.keep_after(0, scores[None], media, layout) & media
    assert int(keep.sum()) == compressor.counts(layout)[0, 0]
    return (keep | ~media)[0]


@checks("fastv_")
def check_fastv(v: Vectors) -> None:
    arrays = v.related(v.given("inputs_file"))
    layout, scores = input_layout(arrays), torch.from_numpy(arrays["llm_scores"])
    video, audio = (layout.mask(m)[0] for m in (Modality.VIDEO, Modality.AUDIO))
    depth = v.given("num_layers")

    def published(name: str, **ratios: float) -> InnerCompressor:
        fields = {"rounding": "official", "score": "seats_post_layer", "k": v.given("fastv_k")}
        return build_compressor(name, **fields, **ratios).for_depth(depth)

    averages = {name: v.given(f"avg_{name}") for name in ("video_ratio", "audio_ratio")}
    both = published("fastv_om", **averages)
    for name, ratio in averages.items():
        v.close(f"setting_{name}", torch.tensor(both.behind(ratio), dtype=torch.float64), atol=1e-12)
    v.equal("keep_fastv_om", kept_after(both, scores, layout))
    # With intact audio the published code knows shares behind the cut; ours are means over layers.
    shares = {name: v.given(f"intact_{name}") for name in averages}
    means = {name: (v.given("fastv_k") * (1 - share) + depth * share) / depth for name, share in shares.items()}
    kept, expected = kept_after(published("fastv", **means), scores, layout), v.output("keep_fastv")
    assert torch.equal(kept[~audio], expected[~audio]), "keep_fastv"
    # Audio that must go although it should be whole goes at random there.
    assert int(kept[audio].sum()) == int(expected[audio].sum()), "keep_fastv"
    v.equal("keep_fastv_audio_is_random", int(shares["audio_ratio"] < 1))
    if shares["audio_ratio"] == 1:
        sizes = {"video_ratio": int(video.sum()), "audio_ratio": int(audio.sum())}
        total = sum(averages[name] * size for name, size in sizes.items()) / sum(sizes.values())
        v.equal("keep_fastv", kept_after(published("fastv", retained_ratio=total), scores, layout))


@checks("fastv_official_")
def check_fastv_picture(v: Vectors) -> None:
    attention, start, length = v.given("attention")[0, :, 0], v.given("sys_length"), v.given("image_len")
    modality = np.full(attention.shape[1], int(Modality.TEXT))
    modality[start : start + length] = Modality.VIDEO
    zeros = np.where(modality == Modality.VIDEO, 0, -1)
    layout = TokenLayout.stack([TokenMap(modality, zeros, zeros, zeros, np.arange(len(modality)), zeros, zeros)])
    compressor = build_compressor("fastv_om", rounding="official", k=2, video_ratio=1.0, audio_ratio=1.0)
    ratio = compressor.mean(v.given("rank") / length)
    cut = compressor.at(video_ratio=ratio, audio_ratio=1.0)
    v.equal("keep_index", kept_after(cut, attention.mean(dim=0), layout).nonzero()[:, 0])
