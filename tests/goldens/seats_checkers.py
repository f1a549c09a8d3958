"""Checkers of SEATS' vector files."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Qwen2_5OmniThinkerConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniDecoderLayer

from omnisieve import build_compressor
from omnisieve.backbones.layer_attention import attention_of_rows
from omnisieve.compressors.layer_schedules import BlockDecay
from omnisieve.compressors.topdown import select_top_down
from omnisieve.compressors.windivprune import PUBLISHED_WINDOW
from omnisieve.layout import MEDIA, Modality, TokenLayout, TokenMap
from omnisieve.ops.diversity import maxmin_order
from tests.goldens.checkers import checks
from tests.goldens.layouts import AUDIO_ID, VIDEO_ID, input_layout
from tests.goldens.vectors import Vectors


@checks("seats_wmmd_")
def check_weighted_diversity(v: Vectors) -> None:
    features, count = v.given("features"), v.given("num_retained")
    valid = torch.ones(features.shape[:2], dtype=torch.bool)
    for name, weight in (("idx_weighted", v.given("attn")), ("idx_plain", None)):
        v.equal(name, maxmin_order(features, valid, count, weight).sort(dim=-1).values)
    v.equal("stable_perturb", 1)


@checks("seats_windivprune_")
def check_first_stage(v: Vectors) -> None:
    arrays = v.related(v.given("inputs_file"))
    layout = input_layout(arrays)
    compressor = build_compressor(
        "windivprune", rounding="official", video_ratio=v.given("video_ratio"), audio_ratio=v.given("audio_ratio")
    )
    windows = {Modality.VIDEO: v.given("grid_in_window"), Modality.AUDIO: v.given("audio_window_tokens")}
    assert windows == {modality: size for modality, (_, size) in PUBLISHED_WINDOW.items()}
    assert v.given("sec_in_audio_window") == 2
    needs = {}
    for need, name in zip(compressor.needs, ("video_attn", "audio_attn"), strict=True):
        mask = layout.mask(need.modality)
        needs[need] = torch.zeros(mask.shape).masked_scatter(mask, torch.from_numpy(arrays[name]))
    plan = compressor.plan(torch.from_numpy(arrays["inputs_embeds"]), layout, needs)
    for modality, name in zip(MEDIA, ("video_mask", "audio_mask"), strict=True):
        v.equal(name, (plan.keep | ~layout.mask(modality))[0])
    v.equal("keep_mask", plan.keep[0])
    v.equal("stable_perturb", 1)
    assert plan.kept[0] == plan.keep.sum()


def top_down(v: Vectors, layout: TokenLayout, tau: float) -> torch.Tensor:
    """[S] bool, text included: what the file's ratios leave of a sequence of which nothing was pruned before."""
    media = layout.mask(*MEDIA)
    ratios = (v.given("video_keep_ratio"), v.given("audio_keep_ratio"))
    kept = [max(1, round(ratio * int(layout.counts(m)[0]))) for m, ratio in zip(MEDIA, ratios, strict=True)]
    keep = select_top_down(v.given("scores")[None], media, layout, torch.tensor([kept]), tau=tau, official=True)
    return (keep | ~media)[0]


@checks("seats_topdown_")
def check_top_down(v: Vectors) -> None:
    layout = input_layout(v.related(v.given("inputs_file")))
    for name in ("qwen25", "qwen3"):
        v.equal(f"keep_{name}", top_down(v, layout, v.given(f"temp_{name}")))
    v.equal("stable_fp64", 1)


def one_item_layout(ids: np.ndarray) -> TokenLayout:
    """Runs of video and audio without positions."""
    video, audio, zeros = ids == VIDEO_ID, ids == AUDIO_ID, np.zeros_like(ids)
    modality = np.where(video, Modality.VIDEO, np.where(audio, Modality.AUDIO, Modality.TEXT)).astype(np.int64)
    return TokenLayout.stack([TokenMap(modality, zeros, zeros, zeros, zeros, zeros, zeros)])


@checks("seats_topdown_onewindow")
def check_one_window(v: Vectors) -> None:
    layout = one_item_layout(v.given("input_ids").numpy())
    v.equal("keep", top_down(v, layout, 0.1))


@checks("seats_qkscores_")
def check_scores(v: Vectors) -> None:
    """Attention of the last text token in a stock layer, with the file's weights."""
    hidden, text = v.given("hidden"), v.given("text_mask")
    layer = Qwen2_5OmniDecoderLayer(layer_config(v), 0)
    weights = {
        "input_layernorm.weight": "norm_w",
        "self_attn.q_proj.weight": "q_w",
        "self_attn.q_proj.bias": "q_b",
        "self_attn.k_proj.weight": "k_w",
        "self_attn.k_proj.bias": "k_b",
    }
    loaded = layer.load_state_dict({name: v.given(array) for name, array in weights.items()}, strict=False)
    assert not loaded.unexpected_keys
    sections = v.given("mrope_section").tolist()
    # Part i of the channels turns with axis i of time, row, column, and so does its other half.
    cos, sin = (
        torch.cat([part[i % 3] for i, part in enumerate(v.given(name).split(sections * 2, dim=-1))], dim=-1)
        for name in ("cos", "sin")
    )
    last = text.nonzero().max()
    # The published softmax is over the whole sequence, text behind the row included.
    visible = torch.ones(1, 1, len(text), dtype=torch.bool)
    v.close("scores", attention_of_rows(layer, hidden, (cos, sin), last.view(1, 1), visible)[0])


def layer_config(v: Vectors):
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "hidden_size": v.given("hidden").shape[-1],
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": v.given("heads"),
            "num_key_value_heads": v.given("kv_heads"),
            "rms_norm_eps": v.given("norm_eps"),
        }
    ).text_config
    config.head_dim = v.given("head_dim")
    return config


@checks("seats_schedule")
def check_schedule(v: Vectors) -> None:
    for case in sorted({name.split("/")[0] for name in v.names("") if "/" in name}):
        _, cuts, late, *rest = case.split("|")
        video, audio, lambda_ = (float(value.lstrip("rvalmbd")) for value in rest)
        start, middle, deep = (int(layer) for layer in cuts.split("-"))
        layers = v.given(f"{case}/num_layers")
        at = (start, middle + 1, deep + 1, int(late))
        assert v.given(f"{case}/progressive_schedule") == "exp"
        decay = BlockDecay(layers, at)
        v.equal(f"{case}/drop_layers", [after + 1 for after in decay.cuts[:-1]])
        v.equal(f"{case}/remove_layer", decay.cuts[-1] + 1)
        for modality in ("video", "audio"):
            v.equal(f"{case}/{modality}_inner_progressive_ratio_list", decay.keep_ratios(lambda_))
        compressor = build_compressor(
            "seats", rounding="official", video_ratio=video, audio_ratio=audio, lambda_=lambda_, transition_layers=at
        )
        fields = compressor.for_depth(layers).first_fields()
        for modality, ratio in (("video", video), ("audio", audio)):
            # Where the published code stops at a share above 1, ours keeps all.
            share = lambda_ * ratio
            assert fields[f"{modality}_ratio"] == min(share, 1)
            v.equal(f"{case}/{modality}_encoder_ratio", share)
