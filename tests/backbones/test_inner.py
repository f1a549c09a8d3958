"""Pruning inside the LLM: the same tokens as by hand, in every way a model is run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omnisieve import build_compressor
from omnisieve.backbones import adapter_for, attach
from omnisieve.compressors import Compressor
from omnisieve.compressors.inner import Cut, InnerCompressor, InnerSettings, ScoreAt
from omnisieve.layout import MEDIA, Modality, TokenLayout
from omnisieve.ops.topk import topk_mask
from tests.backbones.inner_reference import Reference, Step
from tests.backbones.test_attach import MIXED
from tests.backbones.toys import norm_compressor, stock_embeds
from tests.models import tiny_inputs, tiny_thinker

LAYERS, STEPS = 6, 32
POLICIES = ("keep_as_processed", "prune_all_layers")


class Staircase(InnerCompressor):
    """Three cuts of every kind: half, and half of that, of all media tokens jointly, then none."""

    name = "toy_staircase"
    SCORES = (ScoreAt(0, "input", "all_text"), ScoreAt(2, "output", "text_after_media"))

    def own_first(self) -> Compressor:
        return norm_compressor(0.8)

    def cuts(self) -> tuple[Cut, ...]:
        return Cut(1, self.SCORES[0]), Cut(2, self.SCORES[1]), Cut(4)

    def counts(self, layout: TokenLayout):
        total = self.first.budget(layout).total
        return (
            torch.stack([torch.from_numpy(total // 2), torch.from_numpy(total // 4), torch.zeros(len(total))])
            .long()
            .numpy()
        )

    def keep_after(self, cut: int, scores: Tensor, alive: Tensor, layout: TokenLayout) -> Tensor:
        return topk_mask(scores, alive, torch.from_numpy(self.counts(layout)[cut]))


def staircase(policy: str = "keep_as_processed") -> Staircase:
    return Staircase(InnerSettings(retained_ratio=0.4, kv_policy=policy))


def fastv(policy: str = "keep_as_processed", **fields) -> Compressor:
    return build_compressor("fastv_om", retained_ratio=0.4, kv_policy=policy, **fields)


COMPRESSORS = {
    "staircase": staircase,
    "fastv_om": fastv,
    "fastv_om-late": lambda policy: fastv(policy, k=2, score="seats_post_layer"),
    "fastv_om-composed": lambda policy: fastv(policy, first="stvp"),
}


@pytest.fixture(scope="module")
def thinker():
    return tiny_thinker(layers=LAYERS)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def any_thinker(request):
    return tiny_thinker(layers=LAYERS, attention=request.param)


def greedy(model, inputs, **changes):
    out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **changes)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


# By hand.


def best(scores: dict[int, float], count: int) -> set[int]:
    return set(sorted(scores, key=lambda p: (-scores[p], p))[:count])


def steps_of(name: str, modality: list[int], first: list[bool], asked: int | None = None) -> list[Step]:
    """The cuts of a compressor for one sample.

    Args:
        name: key of `COMPRESSORS`.
        modality: [S].
        first: [S], what the first stage keeps.
        asked: first position of the answer.
    """
    text = [p for p, m in enumerate(modality) if m == Modality.TEXT and (asked is None or p < asked)]
    last_media = max(p for p, m in enumerate(modality) if m in MEDIA)
    places = {m: [p for p, kind in enumerate(modality) if kind == m] for m in MEDIA}
    if name == "staircase":
        total = sum(first[p] for m in MEDIA for p in places[m])
        return [
            Step(1, lambda s: best(s, total // 2), 0, "input", text),
            Step(2, lambda s: best(s, total // 4), 2, "output", [p for p in text if p > last_media]),
            Step(4),
        ]
    full, before, on = {"fastv_om": (1, 1.0, "input"), "fastv_om-late": (2, 1.0, "output")}.get(
        name, (1, 0.4**0.5, "input")
    )
    after = (0.4 * LAYERS - full * before) / (LAYERS - full)
    sizes = {m: len(places[m]) for m in MEDIA}
    count = split(round(after * sum(sizes.values())), sizes)

    def choose(scores: dict[int, float]) -> set[int]:
        return set().union(*(best({p: s for p, s in scores.items() if p in places[m]}, count[m]) for m in MEDIA))

    return [Step(full - 1, choose, full - 1, on, text[-1:])]


def split(total: int, sizes: dict[Modality, int]) -> dict[Modality, int]:
    """Largest remainder."""
    quotas = {m: total * size / sum(sizes.values()) for m, size in sizes.items()}
    whole = {m: int(quota) for m, quota in quotas.items()}
    for m in sorted(sizes, key=lambda m: whole[m] - quotas[m])[: total - sum(whole.values())]:
        whole[m] += 1
    return whole


def by_hand(model, items, name: str, policy: str) -> list[int]:
    """Greedy tokens of one sample."""
    inputs, adapter = tiny_inputs(model, [items]), adapter_for(model)
    embeds, layout = stock_embeds(model, inputs), adapter.layout(inputs["input_ids"], inputs["position_ids"])
    compressor = COMPRESSORS[name](policy)
    first = compressor.first.plan(embeds, layout).keep[0].tolist()
    modality = layout.modality[0].tolist()
    media = {p for p, m in enumerate(modality) if m in MEDIA}
    run = Reference(adapter.decoder, steps_of(name, modality, first), media, policy == "prune_all_layers")
    entering = [p for p, stays in enumerate(first) if stays]
    return run.greedy(adapter.lm_head, embeds[0], inputs["position_ids"][1:, 0], entering, STEPS)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", COMPRESSORS)
def test_greedy_output_equals_that_by_hand(any_thinker, name, policy):
    expected = [by_hand(any_thinker, items, name, policy) for items in MIXED]
    with attach(any_thinker, COMPRESSORS[name](policy)):
        alone = [greedy(any_thinker, tiny_inputs(any_thinker, [items]))[0] for items in MIXED]
        together = greedy(any_thinker, tiny_inputs(any_thinker, MIXED))
    assert alone == expected
    assert together == expected
