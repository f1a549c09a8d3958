"""Exported compressors: what is written is what is read, and nothing else is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import omnisieve
from omnisieve import build_compressor, load_compressor, save_compressor
from omnisieve.artifact import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, ArtifactError, is_artifact
from omnisieve.compressors import Compressor, CompressorError
from omnisieve.files import sha256

HIDDEN = 24
SETTINGS = {"width": 16, "heads": 2, "pruner_channels": 4, "video_ratio": 0.25, "audio_ratio": 0.5}


@pytest.fixture
def compressor() -> Compressor:
    torch.manual_seed(0)
    built = build_compressor("omnisift", hidden_size=HIDDEN, **SETTINGS)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter)
    return built


@pytest.fixture
def exported(compressor: Compressor, tmp_path: Path) -> Path:
    return save_compressor(compressor, tmp_path / "out", card={"backbone": "tiny", "steps": 3})


def rewrite_weights(folder: Path, change) -> None:
    """Apply `change` to the dictionary of weights and sign the new file, as if it had been exported so."""
    weights = load_file(folder / WEIGHTS_FILE)
    change(weights)
    save_file(weights, folder / WEIGHTS_FILE)
    rewrite_config(folder, weights_sha256=sha256(folder / WEIGHTS_FILE))


def rewrite_config(folder: Path, **values) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text()) | values
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def test_round_trip_is_bit_equal(compressor: Compressor, exported: Path) -> None:
    loaded = load_compressor(exported)
    assert not loaded.training
    assert loaded.settings == compressor.settings
    assert loaded.state_dict().keys() == compressor.state_dict().keys()
    for name, value in compressor.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert sorted(path.name for path in exported.iterdir()) == sorted([CARD_FILE, CONFIG_FILE, WEIGHTS_FILE])
    assert "| backbone | tiny |" in (exported / CARD_FILE).read_text()


def test_an_export_is_readable_by_others(exported: Path) -> None:
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (exported, *exported.iterdir()))


def test_bfloat16_stays_bfloat16(compressor: Compressor, tmp_path: Path) -> None:
    loaded = load_compressor(save_compressor(compressor.to(torch.bfloat16), tmp_path / "out"))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_a_new_ratio_replaces_the_exported_ones(exported: Path) -> None:
    settings = load_compressor(exported, retained_ratio=0.3).settings
    assert (settings.retained_ratio, settings.video_ratio, settings.audio_ratio) == (0.3, None, None)
    assert load_compressor(exported, rounding="official").settings.video_ratio == 0.25


def test_unknown_setting_names_the_nearest(exported: Path) -> None:
    with pytest.raises(CompressorError, match="retained_ratio"):
        load_compressor(exported, retained_ration=0.3)


def test_missing_and_left_over_weights_are_named(exported: Path) -> None:
    rewrite_weights(exported, lambda weights: weights.update(stranger=weights.pop("selector.v_proj.bias")))
    with pytest.raises(ArtifactError, match=r"missing: selector\.v_proj\.bias.*left over: stranger"):
        load_compressor(exported)


def test_wrong_shapes_name_both(exported: Path) -> None:
    rewrite_config(exported, hidden_size=HIDDEN + 1)
    with pytest.raises(ArtifactError, match=rf"v_proj\.weight: \(16, {HIDDEN}\) instead of \(16, {HIDDEN + 1}\)"):
        load_compressor(exported)


def test_tampered_weights_are_refused(exported: Path) -> None:
    content = bytearray((exported / WEIGHTS_FILE).read_bytes())
    content[-1] ^= 1
    (exported / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match="is not the file"):
        load_compressor(exported)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "other"}, "does not describe an exported compressor"),
        ({"format_version": 99}, "format version 99"),
        ({"method": "omnisiftt"}, "did you mean 'omnisift'"),
    ],
)
def test_foreign_configs_are_refused(exported: Path, values: dict, message: str) -> None:
    rewrite_config(exported, **values)
    with pytest.raises(ArtifactError, match=message):
        load_compressor(exported)


def test_a_folder_of_something_else_stays_as_it_is(compressor: Compressor, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="no exported compressor"):
        load_compressor(tmp_path)
    with pytest.raises(ArtifactError, match="choose another folder"):
        save_compressor(compressor, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_folder_of_a_run_names_the_export_in_it(compressor: Compressor, tmp_path: Path) -> None:
    for name in ("last", "best"):
        export = save_compressor(compressor, tmp_path / "run" / name)
        with pytest.raises(ArtifactError, match=f"the folder of a training run; give {export}$"):
            load_compressor(tmp_path / "run")


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere is no exported compressor: there is no such folder; .*export"):
        load_compressor(tmp_path / "nowhere")


def test_export_replaces_an_older_one(compressor: Compressor, exported: Path) -> None:
    bias = compressor.get_parameter("selector.v_proj.bias")
    with torch.no_grad():
        bias.add_(1)
    save_compressor(compressor, exported)
    assert torch.equal(load_compressor(exported).get_parameter("selector.v_proj.bias"), bias)
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_what_others_put_into_an_export_stays(compressor: Compressor, exported: Path) -> None:
    kept = {
        ".git/config": "x",
        "notes.md": "x",
        "model/model.safetensors": "x",
        "llm/notes": "x",
        "config.json.bak": "x",
    }
    for name, text in kept.items():
        (exported / name).parent.mkdir(exist_ok=True)
        (exported / name).write_text(text)
    compressor.save_pretrained(exported)
    assert {name: (exported / name).read_text() for name in kept} == kept
    assert load_compressor(exported).settings == compressor.settings


def test_a_new_repository_is_written_into(compressor: Compressor, tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    save_compressor(compressor, tmp_path)
    assert is_artifact(tmp_path)
    assert (tmp_path / ".git").is_dir()


def test_a_failed_export_leaves_the_old_one(compressor: Compressor, exported: Path) -> None:
    with pytest.raises(TypeError):
        save_compressor(compressor, exported, card={"not JSON": object()})
    assert is_artifact(exported)
    assert load_compressor(exported).settings == compressor.settings
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_import_is_cheap_and_the_public_names_are_there() -> None:
    code = "import sys, omnisieve; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
    public = {"attach", "build_compressor", "load_compressor", "load_backbone", "list_compressors"}
    assert public <= set(dir(omnisieve))
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        omnisieve.atach  # noqa: B018
