"""Awkward input: what the published functions do with it, and what ours do instead.

Where published code works and ours means the same, the outcome is compared. Elsewhere ours either meets the exact
budget or refuses with a reason.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from omnisieve import build_compressor
from omnisieve.backbones import BackboneError
from omnisieve.backbones.adapter import arrange
from omnisieve.compressors import CompressorError, Need, UnreachableRatioError, compressor_type
from omnisieve.compressors.inner import InnerCompressor
from omnisieve.layout import MEDIA, Modality, TokenLayout
from omnisieve.ops.budget import floor_product
from omnisieve.ops.estimators import straight_through
from tests.goldens.checkers import checks
from tests.goldens.layouts import video_layout
from tests.goldens.vectors import Vectors
from tests.layouts import LayoutSpec, make_layout

WIDTH = 16

SMALL, SILENT, ODD = LayoutSpec(), LayoutSpec(audio=False), LayoutSpec(windows=4, odd_grids=True)
SHAPES = {
    "w3_4x4_a10": SMALL,
    "w5_6x6_a50": LayoutSpec(windows=5, rows=6, columns=6, audio_per_window=50),
    "w4_4x6_a26tail": LayoutSpec(windows=4, rows=4, columns=6, audio_per_window=26, odd_grids=True),
}
ASKED = {"video_ratio": "asked", "audio_ratio": "asked audio"}
"""Names of the file."""


@checks("edge_cases")
def check_edge_cases(v: Vectors) -> None:
    for entry, ours in (COMPARED | OTHERWISE).items():
        names = v.names(f"{entry}/")
        assert names, f"{entry}: the file has no such entry"
        for name in names:
            v.given(f"{entry}/{name}")
        ours(v, entry)


def kept_of(method: str, layout: TokenLayout, features: Tensor | None = None, **fields: object) -> Tensor:
    """What `method` keeps of random features, [B, S] bool, after a check of its budget."""
    generator = torch.Generator().manual_seed(0)
    shape = (layout.batch_size, layout.length)
    embeds = torch.randn(*shape, WIDTH, generator=generator) if features is None else features
    compressor = build_compressor(method, hidden_size=embeds.shape[-1], **fields).eval()
    needs = {
        need: torch.rand(*shape, *([8] if need.kind == "keys" else []), generator=generator)
        for need in compressor.needs
    }
    keep = compressor.plan(embeds, layout, needs).keep
    budget = compressor.first.budget(layout) if isinstance(compressor, InnerCompressor) else compressor.budget(layout)
    kept = (keep & layout.mask(*MEDIA)).sum(dim=1)
    assert (kept.numpy() == budget.total).all(), method
    assert (keep | layout.mask(*MEDIA))[layout.mask(Modality.TEXT, *MEDIA)].all(), f"{method}: text was dropped"
    return keep


def meets_its_budget(method: str, *specs: LayoutSpec, **fields: object) -> Callable[[Vectors, str], None]:
    """Ours keeps exactly what was asked for, of all samples at once."""

    def check(v: Vectors, entry: str) -> None:
        ratios = {"retained_ratio": 0.4} if "video_ratio" not in fields else {}
        kept_of(method, make_layout(*specs), **ratios, **fields)

    return check


# Compared with the published outcome.


def gates_are_exact(v: Vectors, entry: str) -> None:
    keep, scores = torch.ones(4096, dtype=torch.bool), torch.rand(4096, generator=torch.Generator().manual_seed(0))
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        gates = straight_through(keep, scores.clamp(0.01, 0.99).to(dtype))
        v.equal(f"{entry}/result/{name}_not_one_fraction", float((gates != 1).double().mean()))
        if name == "bf16":
            v.equal(f"{entry}/result/bf16_max_abs_err", float((gates - 1).abs().max()))


def drop_counts(v: Vectors, entry: str) -> None:
    for name in v.names(f"{entry}/result/"):
        count, fraction = name.removeprefix("int(").removesuffix(")").split("*")
        v.equal(f"{entry}/result/{name}", floor_product(np.array(int(count)), float(fraction)))


def duplicates_are_picked_once(v: Vectors, entry: str) -> None:
    features = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0)).repeat(8, 1)
    asked = v.given(f"{entry}/result/requested")
    keep = kept_of("divprune_om", video_layout(1, 48), features[None], video_ratio=asked / 48, audio_ratio=1.0)
    v.equal(f"{entry}/result/unique_selected", int(keep.sum()))


def a_negative_share_is_out_of_reach(v: Vectors, entry: str) -> None:
    compressor = build_compressor("fastv_om", retained_ratio=0.5, k=2)
    v.close(f"{entry}/result", torch.tensor([(0.06 * 28 - 2) / 26, compressor.behind(0.35)]))
    with pytest.raises(UnreachableRatioError, match="reachable are ratios above"):
        compressor.behind(0.06)


def dycoke_frames(v: Vectors, entry: str) -> None:
    frames = int(entry.split()[1])
    layout = video_layout(frames, 16)
    exact = frame_counts(layout, rounding="exact")
    # Of a group of four the first frame stays whole, and the last group is a group like the others.
    assert (exact[::4] == 16).all()
    assert len(exact) == frames
    official = frame_counts(layout, rounding="official")
    shown = official if frames <= 12 else np.concatenate([official[:4], official[-4:]])
    v.equal(f"{entry}/result/kept per frame", shown)
    v.equal(f"{entry}/result/retention", round(float(official.sum()) / (16 * frames), 4))
    v.equal(f"{entry}/result/ideal", (16 + 3 * 4) / 64)


def frame_counts(layout: TokenLayout, **fields: object) -> np.ndarray:
    """Tokens that DyCoke keeps of each frame of 16 at a rate of 0.7, or as few as it can."""
    frames = layout.length // 16
    share = max(1 - 0.75 * 0.7, -(-frames // 4) / frames)
    return kept_of("dycoke", layout, video_ratio=share, audio_ratio=1.0, **fields).reshape(frames, 16).sum(1).numpy()


def visionzip_counts(v: Vectors, entry: str) -> None:
    layout = video_layout(1, 144)
    for name in v.names(f"{entry}/result/"):
        ratio = float(name.removeprefix("R_v="))
        compressor = build_compressor("visionzip_om", rounding="official", video_ratio=ratio, audio_ratio=1.0)
        counts = compressor.split_counts(Modality.VIDEO, layout)
        v.equal(f"{entry}/result/{name}", np.array([int(count[0, 0]) for count in counts]))


# Ours does otherwise.


def a_share_above_one_is_refused(v: Vectors, entry: str) -> None:
    with pytest.raises(CompressorError, match=r"must lie in \(0, 1\]"):
        build_compressor("seats", video_ratio=1.4 * 0.8, audio_ratio=0.5)
    # Where only lambda makes the first stage's share too large, lambda gives way.
    kept_of("seats", make_layout(SMALL), retained_ratio=0.8)


def any_depth_has_a_schedule(v: Vectors, entry: str) -> None:
    layout = make_layout(SHAPES["w5_6x6_a50"])
    for depth in (8, 28, 40):
        counts = build_compressor("seats", retained_ratio=0.3).for_depth(depth).layer_counts(layout)
        assert counts.mean() == pytest.approx(0.3 * layout.counts(*MEDIA)[0], rel=0.02)


def stages_are_independent(v: Vectors, entry: str) -> None:
    # A first stage without cuts is a method of its own.
    meets_its_budget("random", SMALL)(v, entry)
    assert not issubclass(compressor_type("random"), InnerCompressor)


def normalised_windows_differ(v: Vectors, entry: str) -> None:
    layout = make_layout(SHAPES["w5_6x6_a50"])
    first, alive = torch.from_numpy(layout.window == 0), layout.mask(*MEDIA)
    scores = torch.rand(alive.shape, generator=torch.Generator().manual_seed(0)) * torch.where(first, 4, 1) * alive
    scores = scores / scores.sum()

    def kept(normalize: str) -> int:
        """Tokens of the window that is attended to most, after the first cut."""
        seats = build_compressor("seats", retained_ratio=0.3, normalize_scores=normalize).for_depth(28)
        return int((seats.keep_after(0, scores, alive, layout) & first).sum())

    share = kept("none") / build_compressor("seats", retained_ratio=0.3).for_depth(28).counts(layout)[0, 0]
    assert share == pytest.approx(0.2, abs=0.01)
    assert kept("zscore") > 1.5 * kept("none")


def another_length_is_refused(v: Vectors, entry: str) -> None:
    layout = make_layout(SMALL)
    with pytest.raises(BackboneError, match="29 values for 30 audio tokens"):
        arrange(torch.rand(29), Need("attention_received", Modality.AUDIO), layout)


def small_frames_are_no_exception(variant: str) -> Callable[[Vectors, str], None]:
    return meets_its_budget("omnizip", LayoutSpec(rows=1, columns=3), variant=variant)


def what_is_asked_is_what_is_kept(v: Vectors, entry: str) -> None:
    for name in v.names(f"{entry}/result/"):
        case, what = name.split("/")
        if what != "asked":
            continue
        layout = make_layout(SHAPES[case.split()[0]])
        ratios = {key: v.given(f"{entry}/result/{case}/{given}") for key, given in ASKED.items()}
        keep = kept_of("omnizip", layout, **ratios)
        for modality, ratio in zip(MEDIA, ratios.values(), strict=True):
            kept = int((keep & layout.mask(modality)).sum())
            assert abs(kept - ratio * layout.counts(modality)[0]) <= 0.5, case


def four_frames_are_a_group(v: Vectors, entry: str) -> None:
    counts = frame_counts(video_layout(4, 16))
    assert counts[0] == 16
    assert counts.sum() == round((1 - 0.75 * 0.7) * 64)


def a_single_frame_stays(v: Vectors, entry: str) -> None:
    assert frame_counts(video_layout(1, 16)).tolist() == [16]
    with pytest.raises(UnreachableRatioError, match="reachable are"):
        kept_of("dycoke", video_layout(1, 16), video_ratio=0.475, audio_ratio=1.0)


Ours = Callable[[Vectors, str], None]
COMPARED: dict[str, Ours] = {
    "omnisift STE forward value (1-s)+s of kept tokens differs from 1": gates_are_exact,
    "omnisift int() truncation: drop counts for n=50/144 at the paper's ratios": drop_counts,
    "seats weighted_MMD_batch with exact duplicates (six distinct of 48, ask 40)": duplicates_are_picked_once,
    "fastv setting ratio can be negative (R_v=6%, K=2, L=28)": a_negative_share_is_out_of_reach,
    **{f"dycoke {frames} frames of 16 tokens, rate 0.7": dycoke_frames for frames in (5, 8, 9, 12, 64)},
    "visionzip per-frame counts at P=144 (dominant, contextual)": visionzip_counts,
}
OTHERWISE: dict[str, Ours] = {
    "omnisift similarity_pruning, no audio tokens -> [kept, video, audio]": meets_its_budget(
        "omnisift", SILENT, video_pruner="similarity", width=8, heads=2
    ),
    "omnisift batch of two with different kept lengths: torch.stack of the kept rows": meets_its_budget(
        "omnisift", SMALL, ODD, video_pruner="similarity", width=8, heads=2
    ),
    "seats video_windivprune ratio > 1 (lambda 1.4 x R 0.8)": a_share_above_one_is_refused,
    "seats batch 2": meets_its_budget("seats", SMALL, ODD),
    "seats schedule, unknown model": any_depth_has_a_schedule,
    "seats schedule, no drop layers": stages_are_independent,
    "seats tau=0.1 on full-sequence softmax scores gives nearly uniform windows": normalised_windows_differ,
    "omnizip core, audio attention shorter than the audio tokens (odd encoder length)": another_length_is_refused,
    "omnizip core batch 2 (flattened as one sequence; grid of the first sample only)": meets_its_budget(
        "omnizip", SMALL, ODD
    ),
    "omnizip units istm with 3 tokens per frame (k=5 > n)": small_frames_are_no_exception("units"),
    "omnizip core istm with 3 tokens per frame": small_frames_are_no_exception("core"),
    "omnizip core without audio: [kept, total] (video becomes one run)": meets_its_budget("omnizip", SILENT),
    "omnizip core: realised retention against the asked one (clamp to [0.35, 0.75])": what_is_asked_is_what_is_kept,
    "omnizip odd last grid: realised video retention core vs units": meets_its_budget("omnizip", ODD),
    "dash without audio": meets_its_budget("dash", SILENT),
    "dash: segment boundaries are not frame aligned; the remainder of every segment is dropped": meets_its_budget(
        "dash", *SHAPES.values()
    ),
    "dycoke 4 frames": four_frames_are_a_group,
    "dycoke 1 frame": a_single_frame_stays,
    "fastvid llava with 6 frames and c=8": meets_its_budget(
        "fastvid", SMALL, variant="llava", video_ratio=0.3, audio_ratio=1.0
    ),
    "fastvid qwen with 6 frames and c=8": meets_its_budget(
        "fastvid", SMALL, variant="qwen", video_ratio=0.3, audio_ratio=1.0
    ),
}
