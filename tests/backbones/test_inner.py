"""Pruning inside the LLM: the same tokens as by hand, in every way a model is run."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from omnisieve import build_compressor
from omnisieve.backbones import BackboneError, adapter_for, attach
from omnisieve.compressors import Compressor, UnreachableRatioError
from omnisieve.compressors.inner import Cut, InnerCompressor, InnerSettings, ScoreAt
from omnisieve.data.batch import Batch
from omnisieve.layout import MEDIA, Modality, TokenLayout
from omnisieve.ops.topk import topk_mask
from tests.backbones.inner_reference import Reference, Step
from tests.backbones.test_attach import MIXED, hooks_of
from tests.backbones.test_gradients import ANSWER, answers
from tests.backbones.toys import norm_compressor, stock_prompt
from tests.models import (
    FAMILIES,
    FIRST_WORD,
    HIDDEN,
    PICTURE,
    QWEN2_5,
    QWEN3,
    SILENT,
    SOUNDING,
    SPEECH,
    checkpoint_layers,
    tiny_inputs,
    tiny_thinker,
)
from tests.waiting import NoWaiting

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

    def counts(self, layout: TokenLayout) -> np.ndarray:
        total = self.first.budget(layout).total
        return np.stack([total // 2, total // 4, 0 * total])

    def keep_after(self, cut: int, scores: Tensor, alive: Tensor, layout: TokenLayout) -> Tensor:
        counts = torch.from_numpy(self.counts(layout)[cut]).to(scores.device, non_blocking=True)
        return topk_mask(scores, alive, counts)


def staircase(policy: str = "keep_as_processed") -> Staircase:
    return Staircase(InnerSettings(retained_ratio=0.4, kv_policy=policy))


def registered(name: str, policy: str = "keep_as_processed", **fields) -> Compressor:
    return build_compressor(name, retained_ratio=0.4, kv_policy=policy, **fields)


fastv = partial(registered, "fastv_om")


COMPRESSORS = {
    "staircase": staircase,
    "fastv_om": fastv,
    "fastv_om-late": partial(fastv, k=2, score="seats_post_layer"),
    "fastv_om-composed": partial(fastv, first="stvp"),
    "omnidrop": partial(registered, "omnidrop"),
    "seats": partial(registered, "seats"),
    "seats-composed": partial(registered, "seats", first="random", next_layer=True),
}
FAST = (
    *((QWEN2_5, "sdpa", name) for name in ("staircase", "fastv_om", "omnidrop", "seats")),
    (QWEN2_5, "eager", "staircase"),
    (QWEN3, "eager", "staircase"),
    (QWEN3, "sdpa", "fastv_om"),
)
# Their selection is that of their own code, which has tests of its own; everything around it is written out.
BY_THEIR_OWN_CHOICE = ("omnidrop", "seats", "seats-composed")


@pytest.fixture(scope="module", params=FAMILIES)
def thinker(request):
    return tiny_thinker(layers=LAYERS, family=request.param)


@cache
def any_thinker(family: str, attention: str) -> nn.Module:
    return tiny_thinker(layers=LAYERS, attention=attention, family=family)


def everywhere(test: Callable) -> Callable:
    """Parametrizes a test by model, attention and compressor; the fast ones hold each method and each model."""
    cells = [
        pytest.param(*cell, marks=() if cell in FAST else pytest.mark.slow, id="-".join(cell))
        for cell in itertools.product(FAMILIES, ("sdpa", "eager"), COMPRESSORS)
    ]
    return pytest.mark.parametrize(("family", "attention", "name"), cells)(test)


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


def declared_steps(compressor: InnerCompressor, layout: TokenLayout, asked: int | None) -> list[Step]:
    """The cuts that a compressor declares for one sample; it chooses, and nothing else is its own."""
    text = [p for p, m in enumerate(layout.modality[0]) if m == Modality.TEXT and (asked is None or p < asked)]
    last_media = max(p for p, m in enumerate(layout.modality[0]) if m in MEDIA)
    rows = {
        "last_text": text[-1:],
        "text_after_media": [p for p in text if p > last_media],
        "all_text": text,
    }

    def choose(number: int, scores: dict[int, float]) -> set[int]:
        values, alive = torch.zeros(1, layout.length), torch.zeros(1, layout.length, dtype=torch.bool)
        values[0, list(scores)] = torch.tensor(list(scores.values()))
        alive[0, list(scores)] = True
        return set((compressor.keep_after(number, values, alive, layout) & alive)[0].nonzero()[:, 0].tolist())

    return [
        Step(cut.after)
        if cut.score is None
        else Step(cut.after, partial(choose, number), cut.score.layer, cut.score.on, rows[cut.score.rows])
        for number, cut in enumerate(compressor.cuts())
    ]


def split(total: int, sizes: dict[Modality, int]) -> dict[Modality, int]:
    """Largest remainder."""
    quotas = {m: total * size / sum(sizes.values()) for m, size in sizes.items()}
    whole = {m: int(quota) for m, quota in quotas.items()}
    for m in sorted(sizes, key=lambda m: whole[m] - quotas[m])[: total - sum(whole.values())]:
        whole[m] += 1
    return whole


class Sample:
    """One sample, and the decoder that was written out for it."""

    def __init__(self, model, inputs: dict[str, Tensor], name: str, *, asked: int | None = None) -> None:
        prompt = stock_prompt(model, inputs)
        self.embeds, self.positions = prompt["inputs_embeds"][0], inputs["position_ids"][1:, 0]
        with torch.no_grad(), attach(model, COMPRESSORS[name]()) as attachment:
            model(**inputs)
        layout, first = attachment.last_layout, attachment.last_plan.keep[0].tolist()
        modality = layout.modality[0].tolist()
        self.entering = [p for p, stays in enumerate(first) if stays]
        self.media = {p for p, m in enumerate(modality) if m in MEDIA}
        if name in BY_THEIR_OWN_CHOICE:
            self.steps = declared_steps(attachment.compressor, layout, asked)
        else:
            self.steps = steps_of(name, modality, first, asked)
        self.added = [
            torch.zeros_like(self.embeds).masked_scatter(prompt["visual_pos_masks"][0].unsqueeze(-1), features)
            for features in prompt.get("deepstack_visual_embeds") or ()
        ]

    def reference(self, decoder, policy: str = "keep_as_processed") -> Reference:
        return Reference(decoder, self.steps, self.media, prune_all=policy == "prune_all_layers", added=self.added)


def by_hand(model, items, name: str, policy: str) -> list[int]:
    """Greedy tokens of one sample."""
    sample, adapter = Sample(model, tiny_inputs(model, [items]), name), adapter_for(model)
    run = sample.reference(adapter.decoder, policy)
    return run.greedy(adapter.lm_head, sample.embeds, sample.positions, sample.entering, STEPS)


@pytest.mark.parametrize("policy", POLICIES)
@everywhere
def test_greedy_output_equals_that_by_hand(family, attention, name, policy):
    model = any_thinker(family, attention)
    expected = [by_hand(model, items, name, policy) for items in MIXED]
    with attach(model, COMPRESSORS[name](policy)):
        alone = [greedy(model, tiny_inputs(model, [items]))[0] for items in MIXED]
        together = greedy(model, tiny_inputs(model, MIXED))
    assert alone == expected
    assert together == expected


@pytest.mark.parametrize("name", ["fastv_om", "omnidrop", "seats"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_one_is_bit_identical(family, attention, name):
    model = any_thinker(family, attention)
    inputs = tiny_inputs(model, MIXED)
    with torch.no_grad():
        logits, tokens = model(**inputs).logits, greedy(model, inputs)
        with attach(model, build_compressor(name, retained_ratio=1.0)):
            assert torch.equal(model(**inputs).logits, logits)
            assert greedy(model, inputs) == tokens


def test_nothing_is_left_behind(thinker):
    inputs, hooks = tiny_inputs(thinker, MIXED), hooks_of(thinker)
    with torch.no_grad():
        logits = thinker(**inputs).logits
        with attach(thinker, staircase()):
            assert thinker(**inputs).logits.shape[1] < logits.shape[1]
        assert hooks_of(thinker) == hooks
        assert torch.equal(thinker(**inputs).logits, logits)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_cache_holds_what_the_policy_says(thinker, policy):
    compressor = staircase(policy).for_depth(LAYERS)
    with torch.no_grad(), attach(thinker, compressor) as attachment:
        cache = thinker(**tiny_inputs(thinker, [[SOUNDING]])).past_key_values
    layout = attachment.last_layout
    expected = compressor.layer_counts(layout)[:, 0] + layout.counts(Modality.TEXT)
    held = [cache.get_seq_length(layer) for layer in range(LAYERS)]
    assert held == (list(expected) if policy == "keep_as_processed" else [expected[-1]] * LAYERS)
    assert cache.omnisieve_prompt.lengths == tuple(held)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_layers_process_what_was_announced(thinker, name):
    compressor = COMPRESSORS[name]().for_depth(LAYERS)
    with torch.no_grad(), attach(thinker, compressor) as attachment:
        thinker(**tiny_inputs(thinker, MIXED))
        counts = attachment.layer_counts()
    np.testing.assert_array_equal(counts.sum(axis=-1), compressor.layer_counts(attachment.last_layout))
    assert (counts[0] > counts[-1]).any()


def test_layers_of_a_method_before_the_llm_process_the_same(thinker):
    with torch.no_grad(), attach(thinker, norm_compressor()) as attachment:
        with pytest.raises(BackboneError, match="run the model first"):
            attachment.layer_counts()
        thinker(**tiny_inputs(thinker, MIXED))
        counts = attachment.layer_counts()
    budget = attachment.compressor.budget(attachment.last_layout)
    np.testing.assert_array_equal(counts, np.stack([budget.video, budget.audio], axis=-1)[None].repeat(LAYERS, axis=0))


@pytest.mark.parametrize("policy", POLICIES)
def test_beams_equal_those_of_single_samples(thinker, policy):
    with torch.no_grad(), attach(thinker, staircase(policy)) as attachment:

        def beams(samples):
            inputs = tiny_inputs(thinker, samples)
            adapter = adapter_for(thinker)
            layout = adapter.layout(inputs["input_ids"], inputs["position_ids"], inputs["attention_mask"])
            batch = Batch(layout=layout, labels=inputs["input_ids"], **inputs)
            features = adapter.encode(batch)
            embeds = adapter.merge(inputs["input_ids"], features)
            attachment.layout = layout
            rest = {key: inputs[key] for key in ("attention_mask", "position_ids")}
            with adapter.deepstack(features, layout):
                out = thinker.generate(inputs_embeds=embeds, **rest, max_new_tokens=6, do_sample=False, num_beams=3)
            return out.tolist()

        assert beams(MIXED) == [tokens for items in MIXED for tokens in beams([items])]


def test_two_generations_at_once(thinker):
    samples = [[[SOUNDING]], [[SPEECH]], [[SILENT]]]
    with attach(thinker, staircase()):
        expected = [greedy(thinker, tiny_inputs(thinker, s)) for s in samples]
        found = [[] for _ in samples]

        def work(place):
            for _ in range(3):
                found[place].append(greedy(thinker, tiny_inputs(thinker, samples[place])))

        threads = [threading.Thread(target=work, args=(place,)) for place in range(len(samples))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [[tokens] * 3 for tokens in expected]


def test_right_padded_forward_equals_single_samples(thinker):
    with torch.no_grad(), attach(thinker, staircase()) as attachment:
        together = thinker(**tiny_inputs(thinker, MIXED, padding_side="right"), use_cache=False).logits
        text = attachment.last_layout.counts(Modality.TEXT)
        for row, items in enumerate(MIXED):
            alone = thinker(**tiny_inputs(thinker, [items]), use_cache=False).logits[0]
            assert len(alone) == text[row]  # the last cut leaves words alone
            torch.testing.assert_close(together[row, : text[row]], alone, rtol=0, atol=2e-5)


def test_what_a_shallow_model_cannot_reach_is_refused_with_its_depth(thinker):
    with (
        attach(thinker, build_compressor("fastv_om", retained_ratio=0.15)),
        pytest.raises(UnreachableRatioError, match=r"a mean over 6 layers, of which 1 .* ratios above 0\.1667"),
    ):
        thinker(**tiny_inputs(thinker, MIXED))


def test_several_tokens_on_top_are_refused(thinker):
    inputs = tiny_inputs(thinker, [[SOUNDING]])
    with torch.no_grad(), attach(thinker, fastv()):
        cache = thinker(**inputs).past_key_values
        with pytest.raises(BackboneError, match="several tokens on top of a compressed prompt"):
            thinker(input_ids=torch.full((1, 2), FIRST_WORD), past_key_values=cache)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_partitioned_weights_are_asked_for_alike_whatever_the_samples_hold(monkeypatch, name):
    """Under ZeRO-3 ranks wait for each other at every module."""
    model, calls = tiny_thinker(layers=LAYERS), []
    for path, module in adapter_for(model).decoder.named_modules():
        module.register_forward_pre_hook(lambda module, args, path=path: calls.append(path))
    monkeypatch.setattr("omnisieve.backbones.inner.is_partitioned", lambda decoder: True)
    sequences = []
    with torch.no_grad(), attach(model, COMPRESSORS[name]()):
        for items in ([SOUNDING], [SILENT], [PICTURE], []):
            calls.clear()
            model(**tiny_inputs(model, [items]))
            sequences.append(list(calls))
    cuts = COMPRESSORS[name]().for_depth(LAYERS).cuts()
    projections = sum(path.endswith("q_proj") for path in sequences[0])
    assert projections == LAYERS + sum(cut.score is not None for cut in cuts)
    assert sequences[1:] == sequences[:1] * 3


# Training.


def answered(model, inputs, compressor, *, teach: bool = False) -> Tensor:
    """Answer logits [N, V] of a training forward, and the backward pass of their loss."""
    labels = answers(inputs)
    with attach(model, compressor) as attachment:
        attachment.expect(labels=labels, answer_tokens=ANSWER * len(labels))
        logits = model(**inputs, use_cache=False).logits
        assert torch.equal(attachment.targets, labels[labels != -100])
        if teach:
            # Some versions call the hooks again when checkpointing repeats a layer.
            nn.functional.cross_entropy(logits, attachment.targets, reduction="sum").backward()
    return logits


@pytest.mark.parametrize("padding_side", ["left", "right"])
@everywhere
def test_answer_logits_equal_those_by_hand(family, attention, name, padding_side):
    model, expected = any_thinker(family, attention), []
    with torch.no_grad():
        for items in MIXED:
            inputs, adapter = tiny_inputs(model, [items]), adapter_for(model)
            asked = inputs["input_ids"].shape[1] - ANSWER
            sample = Sample(model, inputs, name, asked=asked)
            states, left = sample.reference(adapter.decoder).prefill(sample.embeds, sample.positions, sample.entering)
            rows = [left.index(position) for position in range(asked - 1, asked + ANSWER - 1)]
            expected.append(adapter.lm_head(states[rows]))
        logits = answered(model, tiny_inputs(model, MIXED, padding_side=padding_side), COMPRESSORS[name]())
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=5e-5)


def test_answers_do_not_decide_what_is_kept(thinker):
    inputs = tiny_inputs(thinker, MIXED)
    labels = answers(inputs)
    other = inputs | {
        "input_ids": torch.where(
            labels == -100, inputs["input_ids"], FIRST_WORD + (inputs["input_ids"] - FIRST_WORD + 1) % 50
        )
    }
    assert (other["input_ids"] != inputs["input_ids"]).any()
    with torch.no_grad():
        first = [answered(thinker, batch, staircase()).unflatten(0, (-1, ANSWER))[:, 0] for batch in (inputs, other)]
    # The row before an answer sees what was kept, and no word of the answer.
    torch.testing.assert_close(*first, rtol=0, atol=1e-6)


def test_the_teacher_sees_all_tokens(thinker):
    inputs = tiny_inputs(thinker, MIXED, padding_side="right")
    labels = answers(inputs)
    expected = thinker(**inputs).logits[labels.roll(-1, dims=1) != -100]
    with torch.no_grad(), attach(thinker, staircase()) as attachment, attachment.paused():
        attachment.expect(labels=labels, answer_tokens=ANSWER * len(labels))
        torch.testing.assert_close(thinker(**inputs).logits, expected, rtol=0, atol=1e-5)


def adapted(checkpointing: bool) -> nn.Module:
    """A thinker with trainable adapters that use dropout."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=0.3, init_lora_weights=False)
    model = get_peft_model(tiny_thinker(layers=LAYERS), config)
    if checkpointing:
        checkpoint_layers(model.get_base_model())
    return model.train()


@pytest.mark.parametrize("name", COMPRESSORS)
def test_gradient_checkpointing_changes_nothing_with_adapters(name):
    outcomes = []
    for checkpointing in (False, True):
        model = adapted(checkpointing)
        torch.manual_seed(1)
        logits = answered(model, tiny_inputs(model.get_base_model(), MIXED), COMPRESSORS[name](), teach=True)
        outcomes.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(outcomes[0]) > 2 * LAYERS
    assert any(gradient.abs().max() > 0 for gradient in outcomes[0][1:])
    for plain, repeated in zip(*outcomes, strict=True):
        torch.testing.assert_close(repeated, plain, rtol=1e-5, atol=1e-6)


def test_adapters_take_part_in_scores():
    """Greedy output of a model with adapters equals that of the model they were merged into."""
    model = adapted(False).eval()
    inputs = tiny_inputs(model.get_base_model(), MIXED)
    with attach(model, staircase()):
        tokens = greedy(model, inputs)
    merged = model.merge_and_unload()
    with attach(merged, staircase()):
        assert greedy(merged, inputs) == tokens


def test_a_training_forward_never_waits_for_the_device():
    model = tiny_thinker(layers=LAYERS)
    inputs = tiny_inputs(model, MIXED, padding_side="right")
    adapter = adapter_for(model)
    layout = adapter.layout(inputs["input_ids"], inputs["position_ids"], inputs["attention_mask"]).to("meta")
    model.to("meta")
    embeds = torch.empty(*inputs["input_ids"].shape, HIDDEN, device="meta")
    labels = torch.full(inputs["input_ids"].shape, -100, device="meta")
    positions = inputs["position_ids"][1:].to("meta")
    for compressor in (staircase(), fastv()):
        with attach(model, compressor) as attachment, NoWaiting():
            attachment.expect(layout=layout, labels=labels, answer_tokens=7)
            assert model(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits.shape[0] == 7
