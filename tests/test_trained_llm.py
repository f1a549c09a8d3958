"""What training changed of an LLM: it is put on and taken off, merged, and refused where it does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omnisieve import load_compressor, tune_llm, tuned_llm
from omnisieve.artifact import CARD_FILE, LLM_CONFIG_FILE, LLM_FOLDER, ArtifactError, save_compressor
from omnisieve.backbones import BackboneError, adapter_for
from omnisieve.backbones.tuning import LoraVariants, add_lora
from omnisieve.compressors import build_compressor
from omnisieve.config import LoraSection
from omnisieve.files import sha256
from omnisieve.trained_llm import WEIGHTS_FILE, add_variant, has_tuned_llm, read_tuned_llm
from tests.models import FAMILIES, HIDDEN, SILENT, SOUNDING, tiny_inputs, tiny_thinker
from tests.trained import export_tuned, lora_section


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**tiny_inputs(model, [[SOUNDING], [SILENT]])).logits


def parts_of(model: nn.Module) -> list[tuple[str, type, bool, bool]]:
    """Modules and parameters, by name and state."""
    modules = [(name, type(part), part.training, False) for name, part in model.named_modules()]
    return modules + [(name, type(p), False, p.requires_grad) for name, p in model.named_parameters()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inside_it_is_the_trained_model_and_outside_the_stock_one(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_thinker(family=family, dtype=dtype)
    folder, trained = export_tuned(
        tmp_path / "out", model=tiny_thinker(family=family, dtype=dtype), lora=lora_section(dropout=0.5)
    )
    stock, parts = logits(model), parts_of(model)
    with tuned_llm(model, folder):
        assert torch.equal(logits(model), logits(trained))
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), stock)
    assert not torch.allclose(stock, logits(trained), atol=0.05)
    assert parts_of(model) == parts
    assert not hasattr(adapter_for(model).decoder, "peft_config")


def test_what_learned_before_learns_afterwards(tmp_path: Path) -> None:
    folder, _ = export_tuned(tmp_path / "out")
    model = tiny_thinker().requires_grad_(True)
    with tuned_llm(model, folder):
        pass
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_say_the_same_in_float32(family: str, tmp_path: Path) -> None:
    folder, trained = export_tuned(tmp_path / "out", family=family)
    model = tiny_thinker(family=family)
    tune_llm(model, folder)
    torch.testing.assert_close(logits(model), logits(trained), rtol=1e-4, atol=1e-4)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in tiny_thinker(family=family).named_parameters()]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_merged_into_bfloat16_they_are_rounded(tmp_path: Path) -> None:
    folder, trained = export_tuned(tmp_path / "out", model=tiny_thinker(dtype=torch.bfloat16))
    model, stock = tiny_thinker(dtype=torch.bfloat16), tiny_thinker(dtype=torch.bfloat16)
    tune_llm(model, folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    away = (logits(model) - logits(trained)).float().norm()
    assert 0 < away < 0.1 * (logits(stock) - logits(trained)).float().norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_llm_that_was_tuned_as_a_whole_is_put_in(family: str, tmp_path: Path) -> None:
    folder, trained = export_tuned(tmp_path / "out", "full", family=family)
    model = tiny_thinker(family=family)
    tune_llm(model, folder)
    assert torch.equal(logits(model), logits(trained))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with (
        pytest.raises(ArtifactError, match=r"tuned as a whole.*export\.py .* OUT --merge.*OUT/model"),
        tuned_llm(model, folder),
    ):
        pass


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_no_version(mode, family: str, tmp_path: Path) -> None:
    folder, _ = export_tuned(tmp_path / "out", mode, family=family)
    names = read_tuned_llm(folder).tensors.keys()
    begins = ("decoder.layers.", "decoder.norm.", "decoder.embed_tokens.", "lm_head.")
    assert all(name.startswith(begins) for name in names)
    foreign = ("model.", "language_model", "thinker", "base_layer", "default")
    assert not [name for name in names if any(word in name for word in foreign)]


def test_variants_speak_one_at_a_time(tmp_path: Path) -> None:
    model = tiny_thinker()
    stock, parts = logits(model), parts_of(model)
    variants, expected = LoraVariants(adapter_for(model)), {}
    sections = (lora_section(), lora_section(rank=2, targets=["q_proj", "up_proj"]), lora_section(alpha=2.0))
    for seed, lora in enumerate(sections, 1):
        folder, trained = export_tuned(tmp_path / str(seed), seed=seed, lora=lora)
        expected[add_variant(variants, folder)] = logits(trained)
        assert torch.equal(logits(model), stock)
    for name in [*expected, *reversed(expected)]:
        with variants.speaking(name):
            assert torch.equal(logits(model), expected[name])
        with variants.speaking(None):
            assert torch.equal(logits(model), stock)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    variants.remove()
    assert parts_of(model) == parts
    assert torch.equal(logits(model), stock)


def test_an_error_inside_takes_them_off(tmp_path: Path) -> None:
    folder, _ = export_tuned(tmp_path / "out")
    model = tiny_thinker()
    stock = logits(model)
    with pytest.raises(RuntimeError, match="mine"), tuned_llm(model, folder):
        raise RuntimeError("mine")
    assert torch.equal(logits(model), stock)


def test_adapters_upon_adapters_are_refused(tmp_path: Path) -> None:
    folder, trained = export_tuned(tmp_path / "out")
    before = logits(trained)
    with pytest.raises(BackboneError, match="has low-rank adapters already"), tuned_llm(trained, folder):
        pass
    assert torch.equal(logits(trained), before)
    with pytest.raises(BackboneError, match="has low-rank adapters already"):
        tune_llm(trained, folder)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors and sign them, as if they had been exported so."""
    weights = load_file(folder / LLM_FOLDER / WEIGHTS_FILE)
    change(weights)
    save_file(weights, folder / LLM_FOLDER / WEIGHTS_FILE)
    rewrite_config(folder, weights_sha256=sha256(folder / LLM_FOLDER / WEIGHTS_FILE))


def rewrite_config(folder: Path, **values: object) -> None:
    path = folder / LLM_FOLDER / LLM_CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def on_and_off(model: nn.Module, folder: Path) -> None:
    with tuned_llm(model, folder):
        pass


NAME = "decoder.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weights: weights.pop(NAME), f"missing: {NAME}"),
        (lambda weights: weights.update(stranger=torch.zeros(1)), "left over: stranger"),
        (lambda weights: weights.update({NAME: torch.zeros(5, HIDDEN)}), rf"shape of {NAME}: \(5, 32\) instead of \(4"),
        (lambda weights: weights.update({f"x{i}": torch.zeros(1) for i in range(10)}), r"left over: x7; and 2 more"),
    ],
)
@pytest.mark.parametrize("apply", [on_and_off, tune_llm])
def test_tensors_that_do_not_fit_are_named(
    change: Callable, told: str, apply: Callable[[nn.Module, Path], None], tmp_path: Path
) -> None:
    folder, _ = export_tuned(tmp_path / "out")
    rewrite(folder, change)
    model = tiny_thinker()
    stock, parts = logits(model), parts_of(model)
    with pytest.raises(BackboneError, match=f"do not fit this LLM: .*{told}"):
        apply(model, folder)
    assert torch.equal(logits(model), stock)
    assert parts_of(model) == parts


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_another_llm_is_refused(mode, tmp_path: Path) -> None:
    folder, _ = export_tuned(tmp_path / "out", mode)
    # The attention of both families is the same here.
    for other in (tiny_thinker(layers=2), tiny_thinker(layers=4, family=FAMILIES[1])):
        with pytest.raises(BackboneError, match="do not fit this LLM"):
            tune_llm(other, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_llm_of_the_same_shape_is_refused(family: str, tmp_path: Path) -> None:
    folder, _ = export_tuned(tmp_path / "out", family=family)
    merged = tiny_thinker(family=family)
    tune_llm(merged, folder)
    for other in (tiny_thinker(seed=7, family=family), merged):
        stock, parts = logits(other), parts_of(other)
        for apply in (on_and_off, tune_llm):
            with pytest.raises(BackboneError, match="trained on tiny, and this LLM has other weights"):
                apply(other, folder)
            assert torch.equal(logits(other), stock)
            assert parts_of(other) == parts


@pytest.mark.parametrize("family", FAMILIES)
def test_precision_makes_no_other_llm(family: str, tmp_path: Path) -> None:
    folder, _ = export_tuned(tmp_path / "out", family=family)
    model = tiny_thinker(family=family).to(torch.bfloat16)
    stock = logits(model)
    tune_llm(model, folder)
    assert not torch.equal(logits(model), stock)


def test_weights_that_are_not_finite_are_not_merged(tmp_path: Path) -> None:
    folder, _ = export_tuned(tmp_path / "out")
    rewrite(folder, lambda weights: weights[NAME].fill_(float("nan")))
    with pytest.raises(BackboneError, match="cannot be merged"):
        tune_llm(tiny_thinker(), folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_that_an_llm_does_not_have_are_refused_with_those_it_has(family: str) -> None:
    adapter = adapter_for(tiny_thinker(family=family))
    if family == FAMILIES[0]:
        assert add_lora(adapter, LoraSection())
        return
    # Its experts are one parameter for all: the default names are not there.
    with pytest.raises(BackboneError, match=r"no linear modules down_proj, gate_proj, up_proj; they have .*k_proj"):
        add_lora(adapter, LoraSection())


def test_damage_is_one_error(tmp_path: Path) -> None:
    folder, _ = export_tuned(tmp_path / "out")
    weights = folder / LLM_FOLDER / WEIGHTS_FILE
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match="missing or not the file that"):
        read_tuned_llm(folder)
    weights.unlink()
    with pytest.raises(ArtifactError, match="is missing or"):
        read_tuned_llm(folder)
    weights.write_bytes(b"nothing")
    rewrite_config(folder, weights_sha256=sha256(weights))
    with pytest.raises(ArtifactError, match="no safetensors file"):
        read_tuned_llm(folder)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"format_version": 2}, "format version 1"),
        ({"lora": {"rnk": 1}}, "rnk"),
        ({"lora": {"rank": 0}}, "rank is 0"),
        ({"lora": None}, "does not describe a tuned LLM"),
    ],
)
def test_foreign_descriptions_are_refused(values: dict, told: str, tmp_path: Path) -> None:
    folder, _ = export_tuned(tmp_path / "out")
    rewrite_config(folder, **values)
    with pytest.raises(ArtifactError, match=told):
        read_tuned_llm(folder)
    (folder / LLM_FOLDER / LLM_CONFIG_FILE).write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        read_tuned_llm(folder)


def test_an_export_without_an_llm_is_refused(tmp_path: Path) -> None:
    folder = save_compressor(build_compressor("random", retained_ratio=0.5), tmp_path / "out")
    assert not has_tuned_llm(folder)
    with pytest.raises(ArtifactError, match="trained on a frozen one"):
        tune_llm(tiny_thinker(), folder)
    with pytest.raises(ArtifactError, match="no exported compressor"):
        tune_llm(tiny_thinker(), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("lora", "with tuned_llm(model, SOURCE), attach(model,"),
        ("full", "\ntune_llm(model, SOURCE)\nwith attach(model,"),
    ],
)
def test_it_travels_with_its_compressor_whose_card_says_how_to_use_it(mode, told: str, tmp_path: Path) -> None:
    folder, trained = export_tuned(tmp_path / "out", mode)
    copy = load_compressor(folder).save_pretrained(tmp_path / "copy")
    for export in (folder, copy):
        card = (export / CARD_FILE).read_text()
        assert told in card
        assert "together with the LLM tiny" in card
    model = tiny_thinker()
    tune_llm(model, copy)
    torch.testing.assert_close(logits(model), logits(trained), rtol=1e-4, atol=1e-4)


def test_the_compressor_of_such_an_export_loads_alone(tmp_path: Path) -> None:
    folder, _ = export_tuned(tmp_path / "out")
    assert has_tuned_llm(folder)
    assert load_compressor(folder).name == "omnisift"
