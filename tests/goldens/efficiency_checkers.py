"""Checkers of published arithmetic: cost figures and ratios."""

from __future__ import annotations

import ast
import re

import numpy as np
import pytest
import torch

from omnisieve import build_compressor
from omnisieve.backbones.reference import reference_config
from omnisieve.backbones.shape import DecoderShape, decoder_shape
from omnisieve.compressors import UnreachableRatioError
from omnisieve.evaluation.efficiency import layer_lengths, omnizip_flops, seats_flops, seats_layer_flops
from omnisieve.layout import Modality, TokenLayout, TokenMap
from tests.goldens.checkers import checks
from tests.goldens.vectors import Vectors

RELEASED = {"Qwen2.5-Omni-7B": "qwen2_5_omni_7b", "Qwen2.5-Omni-3B": "qwen2_5_omni_3b"}


def numbers(name: str) -> list[float]:
    """All numbers of a name: [0.3, 0.65, 2, 28] of "fastv_setting|rv0.3|ra0.65|K2|L28"."""
    return [float(text) for text in re.findall(r"\d+\.?\d*", name)]


@checks("flops")
def check_flops(v: Vectors) -> None:
    for name in v.names(""):
        if name.startswith("divprune"):
            tokens, width, intermediate, layers = map(int, numbers(name))
            shape = DecoderShape(layers, width, 32, 32, width // 32, intermediate, 0)
            v.equal(name, omnizip_flops(shape, layer_lengths(layers, tokens), decoded=0))
        elif name.startswith(tuple(RELEASED)):
            model, length, what = name.split("|")
            v.equal(name, cost_of(decoder_shape(reference_config(RELEASED[model]).text_config), int(length[1:]), what))


def cost_of(shape: DecoderShape, length: int, what: str) -> np.ndarray:
    """SEATS' cost of "one layer", of all ("nodrop"), or of all with "drops[(layer, tokens left), ...]"."""
    if what == "one layer":
        return seats_layer_flops(shape, np.array(length))
    drops = [] if what == "nodrop" else ast.literal_eval(what.removeprefix("drops"))
    return seats_flops(shape, layer_lengths(shape.layers, length, drops))


@checks("ratios")
def check_ratios(v: Vectors) -> None:
    for name in v.names(""):
        if name.startswith("fastv_setting"):
            check_conversion(v, name)
        elif name.startswith("windows"):
            tokens, size = map(int, numbers(name))
            sizes = one_frame(0, tokens).segments("flat", Modality.AUDIO, size).sizes[0]
            ends = np.cumsum(sizes)
            v.equal(name, np.stack([ends - sizes, ends], axis=1))
        elif name.startswith("vr"):
            video_ratio, audio_ratio, video, audio = numbers(name)
            total = (video_ratio * video + audio_ratio * audio) / (video + audio)
            budget = build_compressor("visionzip", retained_ratio=total).budget(one_frame(int(video), int(audio)))
            v.close(name, torch.tensor([budget.video[0] / video, budget.audio[0] / audio]))


def check_conversion(v: Vectors, name: str) -> None:
    """FastV's ratio behind the cut; what published code makes negative is out of reach here."""
    *ratios, k, depth = numbers(name)
    compressor = build_compressor("fastv_om", retained_ratio=0.5, k=int(k)).for_depth(int(depth))
    behind = v.output(name).tolist()
    for ratio, share in zip(ratios, behind, strict=True):
        assert compressor.mean(share) == pytest.approx(ratio, abs=1e-12), name
        if share > 0:
            assert compressor.behind(ratio) == pytest.approx(share, abs=1e-12), name
        else:
            with pytest.raises(UnreachableRatioError, match="reachable are ratios above"):
                compressor.behind(ratio)


def one_frame(video: int, audio: int) -> TokenLayout:
    """So many video tokens in one frame, and as many audio tokens."""
    modality = np.repeat([int(Modality.VIDEO), int(Modality.AUDIO)], [video, audio])
    place = np.concatenate([np.arange(video), np.arange(audio)])
    item, zeros = (modality == Modality.AUDIO).astype(np.int64), np.zeros_like(place)
    return TokenLayout.stack([TokenMap(modality, item, zeros, zeros, place, zeros, zeros)])
