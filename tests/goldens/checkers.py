"""One checker per kind of vector file, through the public API wherever there is one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from omnisieve import build_compressor
from omnisieve.compressors.omnisift import VisionGuidedSelector
from omnisieve.layout import Modality
from omnisieve.ops.diversity import maxmin_order
from omnisieve.plan import Plan
from tests.goldens.layouts import MERGE, input_layout, video_layout
from tests.goldens.vectors import Vectors

Checker = Callable[[Vectors], None]
CHECKERS: dict[str, Checker] = {}


def checks(prefix: str) -> Callable[[Checker], Checker]:
    """Register a checker for all files whose name starts with `prefix`; the longest prefix wins."""

    def add(checker: Checker) -> Checker:
        CHECKERS[prefix] = checker
        return checker

    return add


def kept(rate: float) -> float:
    """The kept share that belongs to a removed one."""
    return round(1 - rate, 12)


def counts(keep: torch.Tensor, mask: torch.Tensor) -> int:
    return int((keep & mask).sum())


@checks("inputs/")
def check_inputs(v: Vectors) -> None:
    names = ("inputs_embeds", "input_ids", "position_ids", "video_grid_thw", "video_key", "audio_key")
    arrays = {name: v.given(name).numpy() for name in names}
    layout = input_layout(arrays)
    frames, rows, columns = (int(n) for n in arrays["video_grid_thw"][0])
    patches = rows // MERGE * (columns // MERGE)
    windows = {m: layout.segments("window", m).sizes[0] for m in (Modality.VIDEO, Modality.AUDIO)}
    v.equal("grids_per_window", windows[Modality.VIDEO] // patches)
    v.equal("audio_per_window", windows[Modality.AUDIO])
    video, audio = layout.counts(Modality.VIDEO)[0], layout.counts(Modality.AUDIO)[0]
    assert video == frames * patches == arrays["video_key"].shape[1]
    assert audio == arrays["audio_key"].shape[1]
    # Softmax attention, summed over queries, has mean 1 over its span.
    for name, span in (("video_attn", patches), ("audio_attn", audio)):
        mean = v.given(name).reshape(-1, span).mean(dim=-1)
        torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0, atol=1e-5)
    assert abs(float(v.given("llm_scores").sum()) - 1) < 1e-5


def omnisift(v: Vectors) -> torch.nn.Module:
    """OmniSIFT with the published pruner, ratios and the file's parameters."""
    compressor = build_compressor(
        "omnisift",
        hidden_size=v.given("param.v_proj.weight").shape[1],
        video_ratio=kept(v.given("rho_video")),
        audio_ratio=kept(v.given("rho_audio")),
        rounding="official",
        video_pruner="similarity",
        score_norm="none",
        width=v.given("hidden_dim"),
        heads=v.given("nhead"),
    )
    compressor.selector.load_state_dict({name: v.given(f"param.{name}") for name in v.names("param.")})
    return compressor


@checks("omnisift_")
def check_omnisift(v: Vectors) -> None:
    compressor = omnisift(v)
    arrays = v.related(v.given("inputs_file"))
    layout = input_layout(arrays)
    video, audio = layout.mask(Modality.VIDEO), layout.mask(Modality.AUDIO)
    embeds = torch.from_numpy(arrays["inputs_embeds"]).requires_grad_()
    plan = compressor.plan(embeds, layout)
    v.equal("keep_mask", plan.keep)
    v.equal("video_count", counts(plan.keep, video))
    v.equal("audio_count", counts(plan.keep, audio))
    assert plan.kept[0] == plan.keep.sum()
    v.close("audio_scores", plan.scores[audio])
    v.equal("audio_scores_len", layout.segments("window", Modality.AUDIO).sizes[0])

    rows = plan.apply(embeds).embeds[0]
    gated = torch.zeros_like(embeds[0]).index_put((plan.keep[0].nonzero()[:, 0],), rows)
    v.close("audio_embeds_out", gated[audio[0]])
    generator = torch.Generator().manual_seed(v.given("loss_weight_seed"))
    (rows * torch.randn(rows.shape, generator=generator)).sum().backward()
    v.gradient("grad_audio_inputs", embeds.grad[audio])
    assert not embeds.grad[audio & ~plan.keep].any(), "a dropped token received a gradient"
    for name, parameter in compressor.selector.named_parameters():
        v.gradient(f"grad.{name}", parameter.grad)
    v.equal("stable_fp64", 1)


@checks("omnisift_selector_")
def check_omnisift_selector(v: Vectors) -> None:
    video, audio = v.given("v"), v.given("a")
    selector = VisionGuidedSelector(video.shape[1], v.given("hidden_dim"), v.given("nhead"))
    selector.load_state_dict({name: v.given(f"param.{name}") for name in v.names("param.")})
    visible = torch.ones(1, len(video), dtype=torch.bool)
    v.close("scores", selector(audio[None], selector.project_video(video[None]), visible).sigmoid()[0])


@checks("omnisift_batch2_")
def check_omnisift_batch(v: Vectors) -> None:
    compressor = omnisift(v)
    samples = [v.related(str(name)) for name in v.given("inputs_files")]
    layout = input_layout(*samples)
    embeds = torch.cat([torch.from_numpy(arrays["inputs_embeds"]) for arrays in samples])
    keep = compressor.plan(embeds, layout).keep
    v.equal("keep_mask", keep)
    v.equal("video_count", counts(keep, layout.mask(Modality.VIDEO)))
    v.equal("audio_count", counts(keep, layout.mask(Modality.AUDIO)))


@checks("omnizip_")
def check_omnizip(v: Vectors) -> None:
    arrays = v.related(v.given("inputs_file"))
    layout = input_layout(arrays)
    embeds = torch.from_numpy(arrays["inputs_embeds"])
    audio = layout.mask(Modality.AUDIO)
    attention = torch.zeros(audio.shape).masked_scatter(audio, torch.from_numpy(arrays["audio_attn"]))
    v.equal("units_num_input_frames", 2 * arrays["video_grid_thw"][0, 0])
    for variant in ("core", "units"):
        compressor = build_compressor(
            "omnizip",
            variant=variant,
            rounding="official",
            video_ratio=kept(v.given("rho_video")),
            audio_ratio=kept(v.given("rho_audio")),
            merge_group=v.given("g"),
            contextual_ratio=v.given("contextual_ratio"),
            rho_min=v.given("rho_min"),
            rho_max=v.given("rho_max"),
        )
        plan = compressor.plan(embeds, layout, {compressor.needs[0]: attention})
        v.equal(f"{variant}_keep_mask", plan.keep[0])
        merged = embeds if plan.merge is None else plan.merge.apply(embeds)
        v.close(f"{variant}_audio_embeds_out", merged[audio])
        v.equal(f"{variant}_stable_fp64", 1)
        assert (plan.keep.sum(dim=1).numpy() <= plan.kept).all()
        if variant == "core":
            v.equal("core_audio_keep", plan.keep[audio])
            anchors = int(np.rint(v.given("contextual_ratio") * int(audio.sum())))
            merges = merge_lists(plan, audio[0], anchors)
            for name, actual in zip(("merge_anchor", "merge_len", "merge_members"), merges, strict=True):
                v.equal(name, actual)


def merge_lists(plan: Plan, audio: torch.Tensor, anchors: int) -> tuple[np.ndarray, ...]:
    """Anchors, how many tokens each takes up, and these, best first, all counted among the audio tokens."""
    keep, attention = plan.keep[0, audio], plan.scores[0, audio]
    dominant = attention.masked_fill(~keep, -torch.inf).argsort(descending=True)[: int(keep.sum()) - anchors]
    keep[dominant] = False
    taken: dict[int, list[tuple[float, int]]] = {int(anchor): [] for anchor in keep.nonzero()}
    ordinal = (audio.long().cumsum(0) - 1).tolist()
    triples = (t[0].tolist() for t in (plan.merge.source, plan.merge.target, plan.merge.weight))
    for source, target, weight in zip(*triples, strict=True):
        if weight > 0:
            taken[ordinal[target]].append((-weight, ordinal[source]))
    members = [[member for _, member in sorted(group)] for group in taken.values()]
    return np.array(list(taken)), np.array([len(m) for m in members]), np.array([m for group in members for m in group])


@checks("omnizip_istm_")
def check_omnizip_frames(v: Vectors) -> None:
    features, patches = v.given("features"), v.given("tokens_per_frame")
    layout = video_layout(len(features) // patches, patches)
    rate, nothing = v.given("ratio"), torch.zeros(1, len(features))
    official = build_compressor("omnizip", rounding="official", video_ratio=kept(rate), audio_ratio=1.0)
    v.equal("core_mask", official.plan(features[None], layout, {official.needs[0]: nothing}).keep[0])
    v.equal("core_stable_fp64", 1)
    # The first release cuts by halves of grids, this file does not: the exact budget keeps as many per frame.
    share = int(patches * kept(rate)) / patches
    units = build_compressor("omnizip", variant="units", video_ratio=share, audio_ratio=1.0)
    v.equal("units_mask", units.plan(features[None], layout, {units.needs[0]: nothing}).keep[0])


@checks("divprune_")
def check_divprune(v: Vectors) -> None:
    features, ratio = v.given("features"), v.given("ratio")
    layout = video_layout(1, len(features))
    for name in ("divprune", "divprune_om"):
        compressor = build_compressor(name, rounding="official", video_ratio=ratio, audio_ratio=1.0)
        keep = compressor.plan(features[None], layout).keep[0]
        v.equal("selected_sorted", keep.nonzero()[:, 0])
    picks = maxmin_order(features, torch.ones(len(features), dtype=torch.bool), int(compressor.budget(layout).video[0]))
    v.equal("selected_in_order", picks)
    v.equal("stable_fp64", 1)


@checks("random_")
def check_random(v: Vectors) -> None:
    """Counts only: which tokens stay depends on torch's generator."""
    arrays = v.related(v.given("inputs_file"))
    layout = input_layout(arrays)
    embeds = torch.from_numpy(arrays["inputs_embeds"])
    video, audio = layout.mask(Modality.VIDEO)[0], layout.mask(Modality.AUDIO)[0]
    for name, video_ratio, audio_ratio in (("rv30", 0.30, 0.65), ("rv06", 0.06, 0.35)):
        compressor = build_compressor(
            "random",
            rounding="official",
            video_ratio=video_ratio,
            audio_ratio=audio_ratio,
            seed=v.given("torch_seed"),
        )
        keep = compressor.plan(embeds, layout).keep[0]
        v.equal(f"count_{name}", [counts(keep, video), counts(keep, audio)])
        published = v.output(f"keep_{name}")
        assert (published | video | audio).all()
        for mask in (video, audio):
            assert counts(published, mask) == counts(keep, mask), f"keep_{name}"
