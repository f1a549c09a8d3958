"""Compressors shared by the Hugging Face hub: its client library talks to a hub that is a local folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants

from omnisieve import Compressor, build_compressor, load_compressor, push_compressor, tuned_llm
from omnisieve.artifact import CARD_FILE, CONFIG_FILE, FILES, WEIGHTS_FILE, ArtifactError, locate
from omnisieve.compressors import CompressorError
from omnisieve.compressors.omnisift import OmniSift
from omnisieve.compressors.random import Random
from omnisieve.evaluation.methods import resolve_methods
from omnisieve.hub import HubError, is_repo_name
from tests.local_hub import COMMIT, LocalHub, local_hub
from tests.models import tiny_thinker
from tests.trained import export_tuned

REPO = "owner/omnisift-25"
CARD = {"backbone": "Qwen/Qwen2.5-Omni-7B", "steps": 3}


@pytest.fixture
def compressor() -> Compressor:
    torch.manual_seed(0)
    return build_compressor("omnisift", hidden_size=24, width=16, heads=2, pruner_channels=4, retained_ratio=0.25)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with local_hub(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def header(card: Path) -> dict:
    """What the hub reads of a model card."""
    return yaml.safe_load(card.read_text().split("---\n")[1])


def same(one: Compressor, other: Compressor) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    equal = all(torch.equal(ours[name], theirs[name]) for name in ours)
    return equal and ours.keys() == theirs.keys() and one.settings == other.settings


def test_what_is_pushed_is_what_is_loaded(compressor: Compressor, hub: LocalHub) -> None:
    url = compressor.push_to_hub(REPO, card=CARD, license="apache-2.0", private=True)
    assert url == f"{hub.url}/{REPO}/commit/{COMMIT}"
    assert sorted(path.name for path in (hub.folder / REPO).iterdir()) == sorted(FILES)
    assert [asked.get("visibility", asked.get("private")) for asked in hub.created] in (["private"], [True])
    loaded = load_compressor(REPO)
    assert same(loaded, compressor)
    assert not loaded.training
    assert loaded.provenance == {**CARD, "license": "apache-2.0"}
    assert same(Compressor.from_pretrained(REPO, revision=COMMIT), compressor)
    assert load_compressor(REPO, retained_ratio=0.5).settings.retained_ratio == 0.5


def test_a_new_repository_is_as_its_owner_has_them(compressor: Compressor, hub: LocalHub) -> None:
    compressor.push_to_hub(REPO)
    assert not {"visibility", "private"} & set(hub.created[0])


def test_a_second_push_replaces_the_first(compressor: Compressor, hub: LocalHub) -> None:
    push_compressor(build_compressor("random", retained_ratio=0.5), REPO)
    push_compressor(compressor, REPO)
    assert same(load_compressor(REPO), compressor)


def test_only_the_files_of_an_export_are_downloaded(compressor: Compressor, hub: LocalHub) -> None:
    compressor.push_to_hub(REPO)
    (hub.folder / REPO / "pytorch_model.bin").write_bytes(b"anything")
    (hub.folder / REPO / "modeling.py").write_text("raise SystemExit")
    hub.asked.clear()
    assert sorted(path.name for path in locate(REPO).iterdir()) == sorted(FILES)
    assert any(asked.endswith(WEIGHTS_FILE) for asked in hub.asked)
    assert not [asked for asked in hub.asked if asked.endswith((".bin", ".py"))]


def test_a_tuned_llm_goes_where_its_compressor_goes(compressor: Compressor, hub: LocalHub, tmp_path: Path) -> None:
    export = compressor.save_pretrained(tmp_path / "export")
    (export / "llm").mkdir()
    content = dict.fromkeys(("tuned_llm.json", "tuned_llm.safetensors"), b'{"mode": "lora", "base": "tiny"}')
    for name, written in {**content, "tuned_llm.bin": b"anything"}.items():
        (export / "llm" / name).write_bytes(written)
    load_compressor(export).push_to_hub(REPO)
    copy = load_compressor(REPO).save_pretrained(tmp_path / "copy")
    found = {path.name: path.read_bytes() for path in (copy / "llm").iterdir()}
    assert found == content
    assert build_compressor("random", retained_ratio=0.5).tuned_llm is None


def test_an_llm_from_the_hub_is_put_on(hub: LocalHub, tmp_path: Path) -> None:
    folder, trained = export_tuned(tmp_path / "export")
    load_compressor(folder).push_to_hub(REPO)
    model, ids = tiny_thinker(), torch.arange(9, 60)[None]
    with tuned_llm(model, REPO):
        assert torch.equal(model(input_ids=ids).logits, trained(input_ids=ids).logits)
    brings, borrows = resolve_methods([REPO, "random"], {"random": {"llm": REPO}})
    assert brings.llm == borrows.llm == locate(REPO)


def test_an_evaluation_takes_a_name_on_the_hub(compressor: Compressor, hub: LocalHub) -> None:
    compressor.push_to_hub(REPO)
    (method,) = resolve_methods([REPO], {})
    assert (method.label, method.name, method.kind) == (REPO, "omnisift", "learned")
    assert same(method.build(0.25), compressor)


def test_what_was_downloaded_loads_without_the_hub(
    compressor: Compressor, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressor.push_to_hub(REPO)
    load_compressor(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert same(load_compressor(REPO), compressor)
    assert not hub.asked


def test_what_the_hub_does_not_have_is_named(hub: LocalHub, compressor: Compressor) -> None:
    with pytest.raises(HubError, match=r"owner/nothing is no exported compressor: .*no such repository, or it is priv"):
        load_compressor("owner/nothing")
    compressor.push_to_hub(REPO)
    with pytest.raises(HubError, match="no revision 'v9'"):
        load_compressor(REPO, revision="v9")
    (hub.folder / REPO / CONFIG_FILE).write_text('{"model_type": "qwen2_5_omni"}')
    with pytest.raises(ArtifactError, match="does not describe an exported compressor"):
        load_compressor(REPO)


def test_no_hub_and_no_cache_is_one_clear_message(
    compressor: Compressor, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        HubError, match=r"/cache does not have it, and http://127\.0\.0\.1:1 cannot be asked: .*refused$"
    ):
        load_compressor(REPO)
    with pytest.raises(HubError, match=r"cannot be written on http://127\.0\.0\.1:1"):
        compressor.push_to_hub(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="does not have it, and HF_HUB_OFFLINE is set"):
        load_compressor(REPO)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", True),
        ("Qwen/Qwen2.5-Omni-7B", True),
        ("name", False),
        ("./owner/name", False),
        ("./name", False),
        ("/owner/name", False),
        ("~/name", False),
        ("owner/name/", False),
        ("runs/s1", False),
        ("owner/na me", False),
    ],
)
def test_a_path_is_not_taken_for_a_name_on_the_hub(
    text: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    assert is_repo_name(text) == expected


def test_a_folder_has_no_revision(compressor: Compressor, tmp_path: Path) -> None:
    folder = compressor.save_pretrained(tmp_path / "out")
    with pytest.raises(ArtifactError, match="revision 'main' is of a repository"):
        load_compressor(folder, revision="main")


def test_methods_of_the_class_save_and_load(compressor: Compressor, tmp_path: Path) -> None:
    folder = compressor.save_pretrained(tmp_path / "out", card=CARD, license="mit")
    for kind in (Compressor, OmniSift):
        assert same(kind.from_pretrained(folder), compressor)
    assert Compressor.from_pretrained(folder, retained_ratio=0.5).settings.retained_ratio == 0.5
    with pytest.raises(CompressorError, match="holds omnisift, not Random"):
        Random.from_pretrained(folder)


def test_methods_work_where_nothing_else_was_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from omnisieve.compressors import build_compressor; "
        "assert 'omnisieve.artifact' not in sys.modules; "
        f"build_compressor('random', retained_ratio=0.5).save_pretrained({str(tmp_path / 'out')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert load_compressor(tmp_path / "out").name == "random"


def test_the_card_tells_the_hub_what_it_is(compressor: Compressor, tmp_path: Path) -> None:
    card = compressor.save_pretrained(tmp_path / "out", card=CARD, license="apache-2.0") / CARD_FILE
    assert header(card) == {
        "library_name": "omnisieve",
        "tags": ["omnisieve", "token-compression", "omnisift"],
        "base_model": "Qwen/Qwen2.5-Omni-7B",
        "license": "apache-2.0",
    }
    # A folder is no name on the hub.
    card = compressor.save_pretrained(tmp_path / "out", card={"backbone": str(tmp_path)}) / CARD_FILE
    assert header(card).keys() == {"library_name", "tags"}
    quoted = compressor.save_pretrained(tmp_path / "out", license="other: ours") / CARD_FILE
    assert header(quoted)["license"] == "other: ours"


def test_where_it_comes_from_travels_from_loading_to_saving(compressor: Compressor, tmp_path: Path) -> None:
    first = compressor.save_pretrained(tmp_path / "first", card=CARD)
    second = load_compressor(first).save_pretrained(tmp_path / "second", license="mit")
    assert load_compressor(second).provenance == {**CARD, "license": "mit"}
    third = load_compressor(first).save_pretrained(tmp_path / "third")
    assert all((first / name).read_bytes() == (third / name).read_bytes() for name in FILES)
