"""Compressing a stock model by hooks: what it computes, what it leaves behind, what it refuses."""

from __future__ import annotations

import contextlib
import itertools
import threading

import pytest
import torch

from omnisieve.backbones import Estimator, adapter_for, attach
from omnisieve.data.batch import Batch
from tests.backbones.toys import greedy_reference, learned_toy, norm_compressor, stock_prompt
from tests.models import FAMILIES, HIDDEN, PICTURE, QWEN3, SILENT, SOUNDING, SPEECH, Media, tiny_inputs, tiny_thinker
from tests.waiting import NoWaiting

STEPS = 6
MIXED = [[SOUNDING], [SILENT], [SPEECH], [SILENT, Media(grids=2, rows=2, columns=2)]]


@pytest.fixture(scope="module", params=FAMILIES)
def thinker(request):
    return tiny_thinker(family=request.param)


@pytest.fixture(scope="module", params=itertools.product(FAMILIES, ["sdpa", "eager"]), ids="-".join)
def any_thinker(request):
    family, attention = request.param
    return tiny_thinker(attention=attention, family=family)


def greedy(model, inputs, **changes):
    out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **changes)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def hooks_of(model):
    """Every hook of every module, by module name."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {(name, kind): list(getattr(m, kind)) for name, m in model.named_modules() for kind in kinds}


def test_ratio_one_is_bit_identical(any_thinker):
    inputs = tiny_inputs(any_thinker, MIXED)
    with torch.no_grad():
        logits = any_thinker(**inputs).logits
        tokens = greedy(any_thinker, inputs)
        with attach(any_thinker, norm_compressor(1.0)):
            assert torch.equal(any_thinker(**inputs).logits, logits)
            assert greedy(any_thinker, inputs) == tokens


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(thinker, fails):
    inputs = tiny_inputs(thinker, [[SOUNDING]])
    hooks, attributes = hooks_of(thinker), set(vars(thinker.model)) | set(vars(thinker))
    with torch.no_grad():
        logits = thinker(**inputs).logits
        with contextlib.suppress(ZeroDivisionError), attach(thinker, norm_compressor()):
            assert thinker(**inputs).logits.shape[1] < logits.shape[1]
            assert hooks_of(thinker) != hooks
            if fails:
                raise ZeroDivisionError
        assert hooks_of(thinker) == hooks
        assert set(vars(thinker.model)) | set(vars(thinker)) == attributes
        assert torch.equal(thinker(**inputs).logits, logits)


def test_a_failing_forward_does_no_harm_to_the_next(thinker):
    inputs = tiny_inputs(thinker, [[SOUNDING]])
    labels = inputs["input_ids"].where(inputs["input_ids"] > 60, -100)
    with torch.no_grad(), attach(thinker, norm_compressor()) as attachment:
        logits = thinker(**inputs).logits
        attachment.expect(labels=labels, answer_tokens=2)
        handle = adapter_for(thinker).layers[1].register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            thinker(**inputs)
        handle.remove()
        assert torch.equal(thinker(**inputs).logits, logits)


@pytest.mark.parametrize("items", [[SOUNDING], [SILENT], [SPEECH], [PICTURE, SOUNDING, SPEECH]])
def test_compressed_greedy_output_equals_feeding_compressed_embeddings(any_thinker, items):
    inputs = tiny_inputs(any_thinker, [items])
    adapter, compressor = adapter_for(any_thinker), norm_compressor()
    prompt = stock_prompt(any_thinker, inputs)
    with torch.no_grad():
        layout = adapter.layout(inputs["input_ids"], inputs["position_ids"])
        keep = compressor.plan(prompt["inputs_embeds"], layout).keep[0]
        assert keep.sum() < len(keep)
        expected = greedy_reference(adapter.decoder, adapter.lm_head, prompt, keep, inputs["position_ids"][1:], STEPS)
        with attach(any_thinker, compressor) as attachment:
            assert greedy(any_thinker, inputs) == [expected]
    assert torch.equal(attachment.last_plan.keep[0], keep)


def test_positions_computed_by_the_model_serve_as_well(thinker):
    inputs = tiny_inputs(thinker, [[SOUNDING]])
    with attach(thinker, norm_compressor()):
        expected = greedy(thinker, inputs)
        del inputs["position_ids"]
        assert greedy(thinker, inputs, use_audio_in_video=True) == expected


@pytest.mark.parametrize("rows", [3, 4])
def test_mixed_batch_generates_what_single_samples_do(any_thinker, rows):
    inputs = tiny_inputs(any_thinker, MIXED)
    inputs["position_ids"] = inputs["position_ids"][-rows:]
    with attach(any_thinker, norm_compressor()) as attachment:
        together = greedy(any_thinker, inputs)
        kept = attachment.last_plan.kept
        alone = [greedy(any_thinker, tiny_inputs(any_thinker, [items]))[0] for items in MIXED]
    assert len(set(kept)) == len(MIXED)  # ragged
    assert together == alone


def test_right_padded_forward_equals_single_samples(thinker):
    with torch.no_grad(), attach(thinker, norm_compressor()) as attachment:
        together = thinker(**tiny_inputs(thinker, MIXED, padding_side="right"), use_cache=False).logits
        kept = attachment.last_plan.kept
        for row, items in enumerate(MIXED):
            alone = thinker(**tiny_inputs(thinker, [items]), use_cache=False).logits[0]
            assert torch.allclose(together[row, : kept[row]], alone, atol=2e-5)


def test_unpadded_inputs_with_ragged_kept_counts(thinker):
    # Both samples have 90 tokens, but not the same number of media tokens.
    items = [Media(grids=4, rows=2, columns=3), Media(grids=5, rows=2, columns=2)]
    wide = [tiny_inputs(thinker, [[item]], text=text) for item, text in zip(items, (6, 8), strict=True)]
    assert wide[0]["input_ids"].shape == wide[1]["input_ids"].shape
    inputs = {
        "input_ids": torch.cat([w["input_ids"] for w in wide]),
        "attention_mask": torch.cat([w["attention_mask"] for w in wide]),
        "position_ids": torch.cat([w["position_ids"] for w in wide], dim=1),
        "pixel_values_videos": torch.cat([w["pixel_values_videos"] for w in wide]),
        "video_grid_thw": torch.cat([w["video_grid_thw"] for w in wide]),
    }
    with attach(thinker, norm_compressor()) as attachment:
        together = greedy(thinker, inputs)
        assert attachment.last_plan.kept[0] != attachment.last_plan.kept[1]
        assert together == [greedy(thinker, w)[0] for w in wide]


@pytest.mark.parametrize("changes", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_equal_those_of_single_samples(thinker, changes):
    # Ready embeddings: the stock expansion of pixel inputs to beams is right in newer versions only.
    with torch.no_grad(), attach(thinker, norm_compressor()) as attachment:

        def beams(samples):
            inputs = tiny_inputs(thinker, samples)
            attachment.layout = layout_of(thinker, inputs)
            with merged(thinker, inputs) as embedded:
                return thinker.generate(**embedded, max_new_tokens=STEPS, do_sample=False, **changes).tolist()

        together = beams(MIXED)
        assert together == [tokens for items in MIXED for tokens in beams([items])]


def test_sampling_is_reproducible_and_returns_several_sequences(thinker):
    inputs = tiny_inputs(thinker, [[SOUNDING], [SPEECH]])
    sampled = []
    with attach(thinker, norm_compressor()):
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            out = thinker.generate(**inputs, max_new_tokens=STEPS, do_sample=True, temperature=3.0)
            sampled.append(out.tolist())
    assert sampled[0] == sampled[1] != sampled[2]


def test_several_sampled_sequences_of_one_prompt(thinker):
    inputs = tiny_inputs(thinker, MIXED)
    with attach(thinker, norm_compressor()) as attachment:
        attachment.layout = layout_of(thinker, inputs)
        options = {"max_new_tokens": STEPS, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
        with merged(thinker, inputs) as embedded:
            out = thinker.generate(**embedded, **options)
        expected = greedy(thinker, inputs)
    assert out.tolist() == [tokens for tokens in expected for _ in range(2)]


def test_without_cache_every_step_compresses_again(thinker):
    inputs = tiny_inputs(thinker, MIXED)
    with attach(thinker, norm_compressor()):
        assert greedy(thinker, inputs, use_cache=False) == greedy(thinker, inputs)


def test_forward_with_the_default_cache_can_be_decoded_by_hand(thinker):
    inputs = tiny_inputs(thinker, MIXED)
    with torch.no_grad(), attach(thinker, norm_compressor()):
        expected = greedy(thinker, inputs)
        out = thinker(**inputs, use_cache=True)
        first = out.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        second = thinker(
            input_ids=first,
            attention_mask=mask,
            position_ids=inputs["position_ids"][..., -1:] + 1,
            past_key_values=out.past_key_values,
        ).logits[:, -1]
    assert [tokens[:2] for tokens in expected] == torch.stack([first[:, 0], second.argmax(-1)], dim=1).tolist()


def test_two_generations_at_once(thinker):
    samples = [[[SOUNDING]], [[SPEECH]], [[SILENT]]]
    with attach(thinker, norm_compressor()):
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


def layout_of(model, inputs):
    return adapter_for(model).layout(inputs["input_ids"], inputs["position_ids"], inputs["attention_mask"])


@contextlib.contextmanager
def merged(model, inputs):
    """Inputs with merged embeddings instead of ids and media, and the deepstack features that belong to them."""
    adapter = adapter_for(model)
    batch = Batch(layout=layout_of(model, inputs), labels=inputs["input_ids"], **inputs)
    features = adapter.encode(batch)
    embeds = adapter.merge(inputs["input_ids"], features)
    with adapter.deepstack(features, batch.layout):
        yield {"inputs_embeds": embeds} | {key: inputs[key] for key in ("attention_mask", "position_ids")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_forward_never_waits_for_the_device(family):
    model = tiny_thinker(family=family)
    if family == QWEN3:
        model.set_experts_implementation("batched_mm")  # the default one wants bfloat16 there
    inputs = tiny_inputs(model, MIXED, padding_side="right")
    layout = layout_of(model, inputs).to("meta")
    adapter = adapter_for(model)
    batch = Batch(layout=layout, labels=inputs["input_ids"], **inputs)
    features = adapter.encode(batch).to("meta")
    model.to("meta")
    compressor = learned_toy(HIDDEN).to("meta")
    labels = torch.full(inputs["input_ids"].shape, -100, device="meta")
    for route in ("hard_drop", "masked"):
        embeds = adapter.merge(inputs["input_ids"].to("meta"), features)
        positions = inputs["position_ids"][1:].to("meta")
        with (
            attach(model, compressor, Estimator(route, 0.5)) as attachment,
            adapter.deepstack(features, layout),
            NoWaiting(),
        ):
            attachment.generator = torch.Generator()
            attachment.expect(layout=layout, labels=labels, answer_tokens=7)
            logits = model(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits
        assert logits.shape == (7, model.config.get_text_config().vocab_size)
        assert attachment.targets.shape == (7,)
