"""The runner asks every question under every method through the stock `generate`."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from omnisieve import tuned_llm
from omnisieve.backbones import BackboneError, adapter_for, attach
from omnisieve.compressors import CompressorError, build_compressor
from omnisieve.data.collate import collate
from omnisieve.data.media import MediaError
from omnisieve.evaluation.accounting import selection_flops
from omnisieve.evaluation.benchmarks import Clip
from omnisieve.evaluation.efficiency import selector_flops, summarise
from omnisieve.evaluation.guards import MediaGuard
from omnisieve.evaluation.methods import resolve_methods
from omnisieve.evaluation.prompts import generate, make_prompts
from omnisieve.evaluation.runner import Evaluation, Results
from tests.evaluation.tiny import TinyBenchmark, tiny_clip
from tests.models import FAMILIES, HIDDEN, PAD, VOCABULARY, family_of, tiny_thinker
from tests.trained import export_tuned

TOKENS = 4


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_thinker()


@pytest.fixture(scope="module", params=FAMILIES)
def any_model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_thinker(family=request.param)


def three_clips(model: nn.Module) -> list[Clip]:
    return [tiny_clip(model, "a"), tiny_clip(model, "b", questions=3), tiny_clip(model, "c", mel=0)]


@pytest.fixture(scope="module")
def clips(model: nn.Module) -> list[Clip]:
    return three_clips(model)


def evaluate(model: nn.Module, clips: list[Clip], entries: list[str], ratios: list[float], **values) -> Results:
    methods = resolve_methods(entries, values.pop("settings", {}))
    options = {"max_new_tokens": TOKENS, "clips_per_batch": 2} | values
    return Evaluation(model, TinyBenchmark(clips), methods, ratios, **options).run()


def predictions(results: Results) -> list[dict[str, str]]:
    return [{answer.question: answer.predicted for answer in cell.answers} for cell in results.cells]


def from_raw_media(model: nn.Module, clip: Clip, question: int, ratio: float) -> list[int]:
    """What the attached stock model generates when it gets pixels and mel spectrograms itself."""
    batch = collate([clip.questions[question]], pad_token_id=PAD, padding_side="left")
    inputs = batch.model_inputs()
    length = inputs["input_ids"].shape[1]
    inputs["position_ids"] = torch.cat([torch.arange(length).expand(1, 1, -1), inputs["position_ids"]])
    with attach(model, build_compressor("random", retained_ratio=ratio)):
        written = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return written[0, length:].tolist()


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_answers_equal_those_from_raw_media(any_model: nn.Module, ratio: float) -> None:
    clips = three_clips(any_model)
    results = evaluate(any_model, clips, ["random"], [ratio])
    expected = {
        f"{clip.id}/{q}": " ".join(map(str, from_raw_media(any_model, clip, q, ratio)))
        for clip in clips
        for q in range(clip.n_questions)
    }
    assert predictions(results) == [expected]
    assert len(set(expected.values())) > 1


def test_prompts_without_compressor_are_the_stock_model(any_model: nn.Module) -> None:
    adapter, clip = adapter_for(any_model), three_clips(any_model)[1]
    prompts = list(make_prompts(adapter, [clip], pad_token_id=PAD))
    assert len(prompts) == 3  # three questions of three lengths
    written = [
        generate(adapter, prompt, TOKENS, eos_token_id=VOCABULARY, pad_token_id=PAD)[0].tolist() for prompt in prompts
    ]
    assert written == [from_raw_media(any_model, clip, q, 1.0) for q in range(3)]
    assert not adapter.lm_head._forward_pre_hooks


def test_batching_changes_no_answer(any_model: nn.Module) -> None:
    clips = three_clips(any_model)
    together = evaluate(any_model, clips, ["full", "stvp"], [0.3], clips_per_batch=3)
    alone = evaluate(any_model, clips, ["full", "stvp"], [0.3], clips_per_batch=1)
    assert predictions(together) == predictions(alone)


@pytest.mark.parametrize("limit", [1, 400])
def test_a_limit_on_tokens_bounds_the_forward_and_changes_no_answer(
    model: nn.Module, clips: list[Clip], limit: int
) -> None:
    clips = [*clips, tiny_clip(model, "d"), tiny_clip(model, "e")]
    longest = max(len(question.input_ids) for clip in clips for question in clip.questions)
    sizes: list[int] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        sizes.append(kwargs["inputs_embeds"].shape[0] * kwargs["inputs_embeds"].shape[1])

    entries, options = ["full", "stvp", "random"], {"clips_per_batch": 5}
    hook = adapter_for(model).decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        limited = evaluate(model, clips, entries, [0.3], tokens_per_forward=limit, **options)
        bounded = max(sizes)
        free = evaluate(model, clips, entries, [0.3], **options)
    finally:
        hook.remove()
    assert predictions(limited) == predictions(free)
    assert [[a.kept for a in cell.answers] for cell in limited.cells] == [
        [a.kept for a in cell.answers] for cell in free.cells
    ]
    assert bounded <= max(limit, longest) < max(sizes)


def test_encoders_run_once_per_clip(model: nn.Module, clips: list[Clip], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    hook = adapter_for(model).visual.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(MediaGuard, "look", lambda *_: None)
    try:
        evaluate(model, clips, ["full", "random", "stvp"], [0.5, 0.25])
    finally:
        hook.remove()
    assert len(calls) == len(clips)


def test_retained_tokens_are_counted(model: nn.Module, clips: list[Clip]) -> None:
    results = evaluate(model, clips, ["full", "random", "oracle", "no_media"], [0.25])
    full, random, oracle, nothing = (cell.answers[0] for cell in results.cells)
    # 4 grids of 6 video tokens, 4 s of sound at 25 tokens a second.
    assert full.present == full.kept == (24, 100)
    assert random.kept == oracle.kept == (6, 25)
    assert nothing.kept == (0, 0)
    assert results.cells[0].answers[-1].present == (24, 0)


def test_unreadable_clips_are_counted_apart(model: nn.Module, clips: list[Clip]) -> None:
    broken = Clip("broken", 7, error=MediaError("x.mp4", "video", "truncated", "the file ends early"))
    with_failure = evaluate(model, [clips[0], broken, *clips[1:]], ["full", "random"], [0.5])
    without = evaluate(model, clips, ["full", "random"], [0.5])
    assert predictions(with_failure) == predictions(without)
    assert [cell.failures for cell in with_failure.cells] == [7, 7]
    assert with_failure.failures[0]["clip"] == "broken"
    assert "x.mp4" in with_failure.failures[0]["error"]


def test_a_ratio_that_one_clip_cannot_reach_is_unreachable(model: nn.Module, clips: list[Clip]) -> None:
    settings = {"audio whole": {"method": "random", "audio_ratio": 1.0}}
    results = evaluate(model, clips, ["audio whole"], [0.9, 0.5], settings=settings)
    reachable, unreachable = results.cells
    assert (reachable.ok, unreachable.ok) == (True, False)
    assert "reachable are" in (unreachable.unreachable or "")
    assert len(reachable.answers) == 7
    assert unreachable.answers == []


def test_each_method_is_asked_on_its_own_llm(any_model: nn.Module, tmp_path: Path) -> None:
    clips, family = three_clips(any_model), family_of(any_model)
    one, other = (export_tuned(tmp_path / str(seed), family=family, seed=seed)[0] for seed in (1, 2))
    settings = {"stvp on one": {"method": "stvp", "llm": str(one)}, "bare": {"method": str(one), "llm": None}}
    entries = ["full", str(one), "stvp", "stvp on one", str(other), "bare"]
    before = [(name, type(part)) for name, part in any_model.named_modules()]
    results = evaluate(any_model, clips, entries, [0.3], settings=settings)
    assert [(name, type(part)) for name, part in any_model.named_modules()] == before
    found = {cell.method: said for cell, said in zip(results.cells, predictions(results), strict=True)}
    assert [cell.llm for cell in results.cells] == [None, str(one), None, str(one), str(other), None]
    # Alone, on models of their own.
    for label, entry, llm in (("stvp", "stvp", None), ("stvp on one", "stvp", one), ("full", "full", None)):
        assert found[label] == alone(any_model, clips, entry, llm), label
    for folder in (one, other):
        assert found[str(folder)] == alone(any_model, clips, str(folder), folder)
    assert found["bare"] == alone(any_model, clips, str(one), None)
    assert len({json.dumps(said) for said in found.values()}) == len(found)


def alone(model: nn.Module, clips: list[Clip], entry: str, llm: Path | None) -> dict[str, str]:
    """What a method answers on the LLM of an export, or the stock one."""
    with nullcontext() if llm is None else tuned_llm(model, llm):
        (said,) = predictions(evaluate(model, clips, [entry], [0.3], settings={entry: {"llm": None}}))
    return said


def test_adapters_of_another_llm_are_an_error(model: nn.Module, clips: list[Clip], tmp_path: Path) -> None:
    folder, _ = export_tuned(tmp_path / "other", model=tiny_thinker(layers=2))
    with pytest.raises(BackboneError, match="do not fit this LLM"):
        evaluate(model, clips, [str(folder)], [0.5])
    assert not [name for name, _ in model.named_modules() if "lora" in name]


def test_a_mistake_in_settings_is_an_error(model: nn.Module, clips: list[Clip]) -> None:
    with pytest.raises(CompressorError, match="no setting 'sed'"):
        evaluate(model, clips, ["random"], [0.5], settings={"random": {"sed": 1}})


def test_model_that_hears_and_sees_passes(model: nn.Module, clips: list[Clip]) -> None:
    found = evaluate(model, clips, ["full"], [1.0]).guards
    assert all(result["passed"] and result["largest_logit_change"] > 0 for result in found.values())


def test_model_that_does_not_hear_is_found_out(clips: list[Clip], caplog: pytest.LogCaptureFixture) -> None:
    deaf = tiny_thinker()
    adapter_for(deaf).audio_tower.proj.weight.zero_()
    with caplog.at_level(logging.WARNING):
        found = evaluate(deaf, clips, ["full"], [1.0]).guards
    assert (found["hearing_test"]["passed"], found["seeing_test"]["passed"]) == (False, True)
    assert "ignores audio" in caplog.text


def test_test_of_an_absent_modality_is_not_claimed(model: nn.Module, clips: list[Clip]) -> None:
    found = evaluate(model, clips[2:], ["full"], [1.0]).guards
    assert found["hearing_test"] is None
    assert found["seeing_test"]["passed"]


def test_costs_are_those_of_the_tokens_that_each_layer_processed(model: nn.Module, clips: list[Clip]) -> None:
    results = evaluate(model, clips[:1], ["full", "random", "fastv_om"], [0.5])
    full, random, inner = (summarise(cell.prefills, results.decoder) for cell in results.cells)
    # 4 grids of 6 video tokens, 4 s of sound at 25 tokens a second.
    assert full["media_tokens_per_layer"] == [124, 124, 124]
    assert random["media_tokens_per_layer"] == [62, 62, 62]
    assert (full["of_full"]["exact"], full["selection_tflops"]) == (1, None)
    # All tokens in the first of three layers, a quarter in the others.
    assert inner["media_tokens_per_layer"] == [124, 31, 31]
    assert inner["layer_retention"] == random["layer_retention"] == 0.5
    # Attention is quadratic: what is left of half the tokens costs less than half where layers differ less.
    assert random["of_full"]["exact"] < inner["of_full"]["exact"] < 0.6
    assert results.cells[2].answers[0].kept == (12, 50)


def test_a_cache_that_is_pruned_holds_what_the_last_layer_saw(model: nn.Module, clips: list[Clip]) -> None:
    settings = {"pruned": {"method": "fastv_om", "kv_policy": "prune_all_layers"}}
    results = evaluate(model, clips[:1], ["fastv_om", "pruned"], [0.5], settings=settings)
    kept, pruned = (cell.prefills[0] for cell in results.cells)
    assert kept.cached.tolist() == kept.processed.tolist() == pruned.processed.tolist()
    assert pruned.cached[0].tolist() == [31, 31, 31]


def test_selection_is_counted_for_a_trained_selector(model: nn.Module, clips: list[Clip]) -> None:
    adapter = adapter_for(model)
    (prompt,) = make_prompts(adapter, [tiny_clip(model, "a", questions=1)], pad_token_id=PAD)
    layout = prompt.batch.layout
    costs = []
    for pruner in ("similarity", "learned"):
        compressor = build_compressor(
            "omnisift", hidden_size=HIDDEN, width=8, heads=2, retained_ratio=0.5, video_pruner=pruner
        ).eval()
        costs.append(selection_flops(compressor, compressor.plan(prompt.embeds, layout), layout))
    # Two windows of 12 video tokens, of which 6 stay, and 50 audio tokens.
    attended, audio, video = np.array([6, 6]), np.array([50, 50]), np.array([12, 12])
    assert costs[0].tolist() == [selector_flops(attended, audio, HIDDEN, 8)]
    # 3 x 3 and 1 x 1 kernels over all 24 tokens.
    convolutions = 2 * 24 * (9 * 8 + 8 * 64 + 9 * 64 + 64)
    assert costs[1].tolist() == [selector_flops(attended, audio, HIDDEN, 8, projected=video) + convolutions]
    assert selection_flops(build_compressor("random", retained_ratio=0.5), None, layout) is None
