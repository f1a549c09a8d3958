"""What must be true of OmniSIFT beyond the golden vectors and the matrix that every method goes through."""

from __future__ import annotations

import pytest
import torch

from omnisieve.compressors import CompressorError, build_compressor
from omnisieve.layout import Modality
from tests.layouts import LayoutSpec, make_layout

WIDTH = 32


def make(video_pruner: str = "learned", **settings):
    torch.manual_seed(0)
    values = {"retained_ratio": 0.25, "width": WIDTH, "heads": 4, "pruner_channels": 8} | settings
    return build_compressor("omnisift", hidden_size=16, video_pruner=video_pruner, **values)


@pytest.mark.parametrize(("hidden_size", "expected"), [(3584, 4_856_321), (2048, 3_283_457)])
def test_published_selector_size(hidden_size: int, expected: int) -> None:
    with torch.device("meta"):
        compressor = build_compressor(
            "omnisift", hidden_size=hidden_size, retained_ratio=0.25, video_pruner="similarity"
        )
    assert sum(p.numel() for p in compressor.parameters()) == expected


def test_learned_pruner_stays_below_five_million() -> None:
    with torch.device("meta"):
        compressor = build_compressor("omnisift", hidden_size=3584, retained_ratio=0.25)
    assert 4_856_321 < sum(p.numel() for p in compressor.parameters()) < 5_000_000


def test_published_selector_weights_load_by_name() -> None:
    names = {
        *(f"{m}.{p}" for m in ("v_proj", "a_proj", "v_norm", "a_norm", "post_attn_norm") for p in ("weight", "bias")),
        *("cross_attn.in_proj_weight", "cross_attn.in_proj_bias"),
        *("cross_attn.out_proj.weight", "cross_attn.out_proj.bias"),
        *(f"score_head.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")),
    }
    assert set(make("similarity").selector.state_dict()) == names


@pytest.mark.parametrize(
    "spec", [LayoutSpec(), LayoutSpec(audio=False), LayoutSpec(video=False), LayoutSpec(video=False, audio=False)]
)
@pytest.mark.parametrize("pruner", ["learned", "similarity"])
def test_every_trainable_is_touched_whatever_the_sample_holds(spec: LayoutSpec, pruner: str) -> None:
    compressor = make(pruner)
    layout = make_layout(spec)
    embeds = torch.randn(1, layout.length, 16)
    compressor.plan(embeds, layout).apply(embeds).embeds.square().sum().backward()
    untouched = [name for name, p in compressor.named_parameters() if p.grad is None]
    assert not untouched
    assert all(p.grad.isfinite().all() for p in compressor.parameters())


def test_gate_is_the_mask_and_no_gate_without_gradient() -> None:
    compressor, layout = make(), make_layout(LayoutSpec(), LayoutSpec(windows=1))
    embeds = torch.randn(2, layout.length, 16)
    plan = compressor.plan(embeds, layout)
    media = layout.mask(Modality.VIDEO, Modality.AUDIO)
    assert torch.equal(plan.gate[media], plan.keep[media].float())
    assert torch.equal(plan.gate[~media], torch.ones_like(plan.gate[~media]))
    with torch.no_grad():
        assert compressor.plan(embeds, layout).gate is None


def test_score_norm_does_not_change_the_selection() -> None:
    layout = make_layout(LayoutSpec(), LayoutSpec(audio=False))
    embeds = torch.randn(2, layout.length, 16)
    kept = [make(score_norm=norm).plan(embeds, layout).keep for norm in ("window", "none")]
    assert torch.equal(*kept)


def test_a_near_duplicate_frame_sinks_as_a_whole() -> None:
    """The frame-level term orders a changed frame above a repeated one across frames of a window."""
    layout = make_layout(LayoutSpec(windows=1, grids_per_window=3, audio=False))
    embeds = torch.randn(1, layout.length, 16)
    frames = layout.segments("frame", Modality.VIDEO).index[0]
    embeds[0, frames[1]] = embeds[0, frames[0]]
    compressor = make()
    with torch.no_grad():
        compressor.pruner.cnn[-1].weight.zero_()
        scores = compressor.plan(embeds, layout).scores[0]
    assert scores[frames[1]].max() < scores[frames[2]].min()


def test_audio_is_guided_by_what_is_kept_of_the_video() -> None:
    """Changing a dropped video token leaves audio scores as they are; changing a kept one does not."""
    compressor, layout = make("similarity", retained_ratio=0.25, score_norm="none"), make_layout(LayoutSpec())
    embeds = torch.randn(1, layout.length, 16)
    audio, video = layout.mask(Modality.AUDIO), layout.mask(Modality.VIDEO)
    with torch.no_grad():
        before = compressor.plan(embeds, layout)
        scaled = embeds.clone()
        # Scaling a later frame's token changes no cosine, so the video selection stays; only its content differs.
        later = video & (layout.previous_frame_token() >= 0)
        dropped, kept = (later & ~before.keep).nonzero()[0], (later & before.keep).nonzero()[0]
        scaled[tuple(dropped)] *= 3
        assert torch.equal(compressor.plan(scaled, layout).scores[audio], before.scores[audio])
        scaled[tuple(kept)] *= 3
        after = compressor.plan(scaled, layout)
    assert torch.equal(after.keep & video, before.keep & video)
    assert not torch.equal(after.scores[audio], before.scores[audio])


@pytest.mark.parametrize("settings", [{"width": 30}, {"video_pruner": "cnn"}, {"score_norm": "batch"}])
def test_settings_that_cannot_be_are_refused(settings: dict) -> None:
    with pytest.raises(CompressorError, match=str(next(iter(settings.values())))):
        make(**settings)
