"""Cost figures are those that papers print, and those of the matrix products in the stock decoder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerTextDecoderLayer

from omnisieve.backbones import BackboneError, adapter_for
from omnisieve.backbones.reference import reference_config
from omnisieve.backbones.shape import DecoderShape, decoder_shape
from omnisieve.compressors import build_compressor
from omnisieve.compressors.inner import InnerCompressor
from omnisieve.compressors.omnisift import VisionGuidedSelector
from omnisieve.evaluation.efficiency import (
    Prefill,
    exact_flops,
    kv_bytes,
    layer_lengths,
    omnizip_flops,
    seats_flops,
    selector_flops,
    summarise,
)
from tests.layouts import LayoutSpec, make_layout
from tests.models import HIDDEN, tiny_thinker

SEVEN, THREE, THIRTY = (
    decoder_shape(reference_config(name).text_config)
    for name in ("qwen2_5_omni_7b", "qwen2_5_omni_3b", "qwen3_omni_30b_a3b")
)
TINY = DecoderShape(2, 4, 2, 1, 2, 8, 10)
TEXT = 150


def tera(count: np.ndarray | float) -> float:
    """FLOPs as TFLOPs."""
    return float(count) / 1e12


# What papers print.


@pytest.mark.parametrize(
    ("ratio", "seven", "three"),
    [(1.0, 73.2, 37.4), (0.55, 35.5, 17.0), (0.5, 31.9, 15.1), (0.45, 28.3, 13.3), (0.35, 21.4, 9.9)],
)
def test_omnizip_table_2(ratio: float, seven: float, three: float) -> None:
    for shape, tflops in ((SEVEN, seven), (THREE, three)):
        media = layer_lengths(shape.layers, round(10_000 * ratio))
        assert tera(omnizip_flops(shape, media)) == pytest.approx(tflops, rel=0.01)


def test_omnizip_table_2_for_a_cut_inside_the_llm() -> None:
    media = layer_lengths(28, 10_000, [(4, 5_000)])  # FastV at layer 5
    assert tera(omnizip_flops(SEVEN, media)) == pytest.approx(39.3, rel=0.01)


@pytest.mark.parametrize(
    ("video", "audio", "tflops"),
    [(1.0, 1.0, 111.0), (0.30, 0.65, 37.4), (0.20, 0.55, 27.6), (0.10, 0.45, 17.6), (0.06, 0.35, 12.8)],
)
def test_seats_table_3(video: float, audio: float, tflops: float) -> None:
    lengths = layer_lengths(28, round(8_600 * video + 3_000 * audio) + TEXT)
    assert tera(seats_flops(SEVEN, lengths)) == pytest.approx(tflops, rel=0.03)


@pytest.mark.parametrize(
    ("video", "audio", "tflops"), [(0.30, 0.65, 36.7), (0.20, 0.55, 26.5), (0.10, 0.45, 17.3), (0.06, 0.35, 12.2)]
)
def test_seats_table_3_for_its_own_schedule(video: float, audio: float, tflops: float) -> None:
    left = np.cumprod([1.4, 0.9298, 0.7949, 0.2986]) * (8_600 * video + 3_000 * audio)
    first, *rest = (round(count) + TEXT for count in left)
    lengths = layer_lengths(28, first, [*zip((15, 17, 19), rest, strict=True), (22, TEXT)])
    assert tera(seats_flops(SEVEN, lengths)) == pytest.approx(tflops, rel=0.03)


@pytest.mark.parametrize(
    ("method", "percent", "tflops"),
    [
        ("divprune_om", 35, 37.4),
        ("visionzip_om", 25, 27.6),
        ("divprune_om", 15, 17.6),
        ("random", 10, 12.8),
        ("fastv_om", 35, 38.3),
        ("fastv_om", 25, 28.3),
        ("seats", 35, 36.7),
        ("seats", 25, 26.5),
        ("seats", 15, 17.3),
        ("seats", 10, 12.2),
    ],
)
def test_seats_table_3_from_presets(method: str, percent: int, tflops: float) -> None:
    """60 grids of 144 tokens and 3,000 of sound, nearly the table's mean sample, through our own budgets."""
    layout = make_layout(LayoutSpec(windows=30, rows=9, columns=16, audio_per_window=100))
    compressor = build_compressor(method, preset=f"seats/7b/{percent}")
    if isinstance(compressor, InnerCompressor):
        media = compressor.for_depth(28).layer_counts(layout)[:, 0]
    else:
        media = layer_lengths(28, compressor.budget(layout).total[0])
    assert tera(seats_flops(SEVEN, media + TEXT)) == pytest.approx(tflops, rel=0.03)


@pytest.mark.parametrize(
    ("video", "audio", "tflops"),
    [(1.0, 1.0, 47.2), (0.32, 0.70, 13.4), (0.22, 0.60, 9.4), (0.12, 0.50, 5.8), (0.07, 0.45, 4.0)],
)
def test_seats_table_8_takes_the_published_shape_of_qwen3(video: float, audio: float, tflops: float) -> None:
    lengths = layer_lengths(48, round(8_600 * video + 3_000 * 13 / 25 * audio) + TEXT)
    published = tera(seats_flops(THIRTY.as_published(), lengths))
    assert published == pytest.approx(tflops, rel=0.06)
    # Heads twice as wide as D / H, and a router.
    assert 1.2 < tera(seats_flops(THIRTY, lengths)) / published < 2


@pytest.mark.parametrize(("video", "gigaflops"), [(96, 0.71), (68, 0.58)])
def test_omnisift_selector(video: int, gigaflops: float) -> None:
    one = selector_flops(np.array([video]), np.array([50]), 3584, 512)
    assert one / 1e9 == pytest.approx(gigaflops, abs=0.005)
    # 140 s; table 7 rounds to 0.06 and 0.04.
    assert 0.04 <= 70 * one / 1e12 < 0.06


# What is computed.


def counted(module: torch.nn.Module, *args, **kwargs) -> int:
    """FLOPs of the matrix products in a call; 2 per multiply-add."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*args, **kwargs)
    return counter.get_total_flops()


def test_exact_flops_are_those_of_the_stock_decoder() -> None:
    adapter, length = adapter_for(tiny_thinker(attention="eager")), 11
    shape = decoder_shape(adapter.decoder.config)
    states = torch.randn(1, length, HIDDEN)
    angles = adapter.decoder.rotary_emb(states, torch.arange(length).expand(3, 1, -1))
    layers = sum(counted(layer, states, position_embeddings=angles) for layer in adapter.layers)
    flops = exact_flops(shape, layer_lengths(shape.layers, length))
    # An eager kernel computes what the causal mask then hides.
    assert flops.total - flops.head + flops.causal_saving == layers
    assert flops.head == counted(adapter.lm_head, states[:, -1:])
    assert flops.causal_saving * (length + 1) == flops.attention * (length - 1)


def test_exact_flops_are_those_of_a_decoder_with_experts() -> None:
    config = Qwen3OmniMoeTextConfig(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=8, moe_intermediate_size=12,
        num_experts=6, num_experts_per_tok=2, num_hidden_layers=1, vocab_size=20,
    )  # fmt: skip
    config._attn_implementation = config._experts_implementation = "eager"
    layer, length = Qwen3OmniMoeThinkerTextDecoderLayer(config, 0), 7
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    angles = torch.zeros(1, length, config.head_dim)
    flops = exact_flops(decoder_shape(config), layer_lengths(1, length))
    computed = counted(layer, torch.randn(1, length, 16), position_embeddings=(angles, angles))
    assert flops.linear + flops.attention + flops.causal_saving == computed


def test_selector_flops_are_those_of_the_selector() -> None:
    selector = VisionGuidedSelector(24, 16, 4).eval()
    video, audio = torch.randn(3, 9, 24), torch.randn(3, 5, 24)
    projection = counted(selector.v_proj, video)
    attention = counted(selector, audio, selector.project_video(video), torch.ones(3, 9, dtype=torch.bool))
    windows = (np.full(3, 9), np.full(3, 5))
    assert selector_flops(*windows, hidden_size=24, width=16) == projection + attention
    every = selector_flops(*windows, hidden_size=24, width=16, projected=np.full(3, 20))
    assert every == projection * 20 // 9 + attention


def test_shape_of_released_models() -> None:
    assert DecoderShape(28, 3584, 28, 4, 128, 18944, 152064) == SEVEN
    assert (THREE.attention_width, THREE.kv_width) == (2048, 256)
    # Eight of 128 experts, 768 wide each; heads twice as wide as D / H.
    assert DecoderShape(48, 2048, 32, 4, 128, 8 * 768, 152064, experts=128) == THIRTY
    assert THIRTY.as_published().kv_width == 256


def test_layers_that_differ_have_no_shape() -> None:
    with pytest.raises(BackboneError, match="mixes layers"):
        decoder_shape(Qwen3OmniMoeTextConfig(decoder_sparse_step=2))


def test_layers_after_a_drop_are_shorter() -> None:
    assert layer_lengths(5, 9, [(3, 1), (1, 4)]).tolist() == [9, 9, 4, 4, 1]


# What a report says.


def prefill(processed: list[list[int]], present: int = 8, text: int = 2, **values) -> Prefill:
    counts = np.array(processed)
    n = len(counts)
    return Prefill(np.full(n, text), np.full(n, present), counts, values.pop("cached", counts), **values)


def test_all_tokens_cost_what_all_tokens_cost() -> None:
    found = summarise([prefill([[8, 8]])], TINY)
    assert set(found["of_full"].values()) == {1.0}
    assert found["layer_retention"] == 1
    assert found["tflops"]["exact"] == exact_flops(TINY, np.array([10, 10])).total / 1e12


def test_fewer_tokens_cost_less_in_every_convention() -> None:
    found = summarise([prefill([[4, 4], [4, 0]])], TINY)
    assert all(0 < share < 1 for share in found["of_full"].values())
    assert found["media_tokens_per_layer"] == [4, 2]
    assert found["layer_retention"] == (4 + 4 + 4 + 0) / 32
    assert found["kv_bytes"] == 2 * TINY.kv_width * 2 * ((4 + 4 + 4 + 0) / 2 + 2 * 2)


def test_a_cache_may_hold_less_than_was_processed() -> None:
    kept, pruned = (summarise([prefill([[8, 4]], cached=np.array([cached]))], TINY) for cached in ([8, 4], [4, 4]))
    assert pruned["kv_bytes"] < kept["kv_bytes"]
    assert pruned["tflops"] == kept["tflops"]


def test_batches_are_averaged_by_prompt() -> None:
    together = summarise([prefill([[4, 4], [8, 8], [0, 0]])], TINY)
    assert summarise([prefill([[4, 4], [8, 8]]), prefill([[0, 0]])], TINY) == together


def test_selection_stands_apart() -> None:
    without, given = (summarise([prefill([[4, 4]], selection=s)], TINY) for s in (None, np.array([3_000])))
    assert (without["selection_tflops"], given["selection_tflops"]) == (None, 3e-9)
    assert given["tflops"] == without["tflops"]


def test_a_prompt_without_media_has_no_retention_and_is_valid_json() -> None:
    found = summarise([prefill([[0, 0]], present=0)], TINY)
    assert found["layer_retention"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_kv_bytes_of_the_7b_model() -> None:
    # 28 layers, keys and values, 4 heads of 128, 2 bytes.
    assert kv_bytes(SEVEN, layer_lengths(28, 10_000)) == 10_000 * 28 * 2 * 4 * 128 * 2
