"""`tools/export.py` copies the right compressor of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tools import export
from torch import nn
from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from omnisieve import trained_llm, tune_llm
from omnisieve.artifact import CARD_FILE, LLM_FOLDER, ArtifactError, load_compressor, read_config, save_compressor
from omnisieve.backbones import adapter_for, load_backbone
from omnisieve.compressors import build_compressor
from tests.backbones.test_released_names import save_released
from tests.data.stock import BACKBONE, save_qwen3, stock_processor
from tests.models import FAMILIES, tiny_thinker
from tests.trained import export_tuned


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training run whose best compressor is full of ones and whose last one is full of twos."""
    for name, value in (("best", 1.0), ("last", 2.0)):
        compressor = build_compressor("omnisift", hidden_size=8, width=8, heads=2, retained_ratio=0.25)
        for parameter in compressor.parameters():
            torch.nn.init.constant_(parameter, value)
        save_compressor(compressor, tmp_path / "run" / name, card={"steps": int(value)})
    return tmp_path / "run"


@pytest.mark.parametrize(("arguments", "value"), [([], 1), (["--which", "best"], 1), (["--which", "last"], 2)])
def test_exports_what_was_asked_for(run: Path, arguments: list[str], value: int) -> None:
    out = run / "export"
    assert export.main([str(run), str(out), *arguments]) == 0
    assert {float(p.detach().max()) for p in load_compressor(out).parameters()} == {value}
    assert read_config(out)["provenance"]["steps"] == value


def test_a_run_without_validation_exports_the_last(run: Path) -> None:
    (run / "best" / "config.json").unlink()
    export.main([str(run), str(run / "export")])
    assert read_config(run / "export")["provenance"]["kept from the run"] == "last"
    with pytest.raises(ArtifactError, match="--which last"):
        export.main([str(run), str(run / "export"), "--which", "best"])


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="output_dir of a training run"):
        export.main([str(tmp_path), str(tmp_path / "out")])


@pytest.fixture(scope="module", params=["lora", "full"])
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, nn.Module]:
    """A run beside a copy of the testbed's LLM that was tuned in it, the copy, and the model that it ended with."""
    folder = tmp_path_factory.mktemp("tuned")
    base = folder / "base"
    load_backbone(BACKBONE).save_pretrained(base)
    stock_processor().save_pretrained(base)
    model = load_backbone(base)
    hidden = adapter_for(model).hidden_size
    _, trained = export_tuned(folder / "run" / "last", request.param, base=base, model=model, hidden_size=hidden)
    return folder / "run", base, trained


def test_a_tuned_llm_is_exported_apart(tuned: tuple[Path, Path, nn.Module], tmp_path: Path, capsys) -> None:
    run, base, _ = tuned
    out = tmp_path / "out"
    assert export.main([str(run), str(out)]) == 0
    for name in ("tuned_llm.json", "tuned_llm.safetensors"):
        assert (out / LLM_FOLDER / name).read_bytes() == (run / "last" / LLM_FOLDER / name).read_bytes()
    assert f"together with the LLM {base}" in (out / CARD_FILE).read_text()
    assert "MB  " in capsys.readouterr().out
    # Of an export of its own.
    assert export.main([str(out), str(tmp_path / "again")]) == 0
    damaged = out / LLM_FOLDER / "tuned_llm.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="copy it again"):
        export.main([str(out), str(tmp_path / "damaged")])
    assert not (tmp_path / "damaged").exists()


def test_a_tuned_llm_is_merged_into_a_stock_model(tuned: tuple[Path, Path, nn.Module], tmp_path: Path, capsys) -> None:
    run, base, trained = tuned
    out = tmp_path / "out"
    assert export.main([str(run), str(out), "--merge"]) == 0
    told = capsys.readouterr().out
    assert told.index(f"reading {base} ...") < told.index("reading it back ...") < told.index("model.safetensors")
    assert not (out / LLM_FOLDER).exists()
    assert f"| LLM | {base} " in (out / CARD_FILE).read_text()
    assert load_compressor(out).tuned_llm is None
    merged = load_backbone(out / "model")
    stock = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(out / "model")
    for name, value in merged.state_dict().items():
        assert torch.equal(stock.state_dict()[name], value), name
    ids = torch.arange(9, 60)[None]
    with torch.no_grad():
        found, expected, before = (m(input_ids=ids).logits for m in (merged, trained, load_backbone(base)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, atol=0.1)
    processor, expected_processor = AutoProcessor.from_pretrained(out / "model"), AutoProcessor.from_pretrained(base)
    chat = [{"role": "user", "content": [{"type": "video", "video": "a"}, {"type": "text", "text": "Who speaks?"}]}]
    assert processor.apply_chat_template(chat) == expected_processor.apply_chat_template(chat)
    assert processor.to_dict() == expected_processor.to_dict()


def test_a_merged_model_and_notes_stay_beside_a_new_export(
    tuned: tuple[Path, Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tuned[0], tmp_path / "out"
    export.main([str(run), str(out), "--merge"])
    (out / "model" / "notes.txt").write_text("mine")
    (out / ".git").mkdir()
    written = (out / "model" / "model.safetensors").read_bytes()
    export.main([str(run), str(out)])
    assert (out / LLM_FOLDER / "tuned_llm.json").is_file()
    assert (out / "model" / "model.safetensors").read_bytes() == written
    export.main([str(run), str(out), "--merge"])
    assert not (out / LLM_FOLDER).exists()
    assert (out / "model" / "notes.txt").read_text() == "mine"
    assert (out / ".git").is_dir()
    load_backbone(out / "model")


def test_what_cannot_be_merged_is_named(tuned: tuple[Path, Path, nn.Module], run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tuned[0], moved)
    description = moved / "last" / LLM_FOLDER / "tuned_llm.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"base": str(tmp_path / "gone")}))
    out = str(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"gone is no folder that exists.*--backbone PATH"):
        export.main([str(moved), out, "--merge"])
    other = save_qwen3(tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"do not fit this LLM|no linear modules"):
        export.main([str(moved), out, "--merge", "--backbone", str(other)])
    with pytest.raises(ArtifactError, match="trained on a frozen one"):
        export.main([str(run), out, "--merge"])
    assert not Path(out).exists()
    with pytest.raises(SystemExit):
        export.main([str(moved), out, "--dtype", "float32"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_is_a_base_too(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_thinker(family=family, dtype=torch.bfloat16)
    base = save_released(model, tmp_path / "base")
    stock_processor(family).save_pretrained(base)
    export_tuned(tmp_path / "export", base=base, model=load_backbone(base, "bfloat16"))
    assert export.main([str(tmp_path / "export"), str(tmp_path / "out"), "--merge"]) == 0
    expected = tiny_thinker(family=family, dtype=torch.bfloat16)
    tune_llm(expected, tmp_path / "export")
    merged = load_backbone(tmp_path / "out" / "model", "auto")
    assert merged.dtype == torch.bfloat16
    for name, value in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value), name


def test_a_difference_is_found_before_success_is_said(
    tuned: tuple[Path, Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = trained_llm.load_backbone

    def misread(path: Path, *arguments: str) -> nn.Module:
        model = load(path, *arguments)
        if Path(path).name == "model":
            next(model.parameters()).data.flatten()[0] += 1
        return model

    monkeypatch.setattr(trained_llm, "load_backbone", misread)
    with pytest.raises(ArtifactError, match="reads back differently"):
        export.main([str(tuned[0]), str(tmp_path / "out"), "--merge"])
    assert not list(tmp_path.iterdir())
