"""An exported compressor: a small folder that anybody can load, or a repository of the Hugging Face hub that holds it.

`config.json` says which method with which settings, `compressor.safetensors` holds the parameters under
the method's own names (no library's module tree is part of them), `README.md` is the model card. Nothing
is pickled.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from omnisieve import __version__
from omnisieve.compressors import Compressor, CompressorError, build_compressor, compressor_type
from omnisieve.compressors.ratios import RATIOS
from omnisieve.files import NotOursError, replacing, sha256
from omnisieve.hub import fetch, is_repo_name, upload
from omnisieve.model_card import model_card
from omnisieve.ops.tensors import misfits, same

FORMAT = "omnisieve-compressor"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "compressor.safetensors"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)
LLM_FOLDER = "llm"
"""Within an export: what training changed of the LLM, see `omnisieve.trained_llm`."""
LLM_CONFIG_FILE = "tuned_llm.json"
"""In that folder: whether that is adapters or all of it, and of which LLM."""
OWNED = (*FILES, f"{LLM_FOLDER}/tuned_llm.*")
"""What an export writes, and an older one may be replaced by."""
SHARED = (*FILES, f"{LLM_FOLDER}/*.json", f"{LLM_FOLDER}/*.safetensors")
"""What goes to the hub and comes from it."""
KEPT_OF_A_RUN = ("best", "last")
"""Folders of a training run that hold its exported compressors."""


class ArtifactError(CompressorError):
    """A folder is not a compressor that this version can load; the message says which part and why."""


def save_compressor(
    compressor: Compressor,
    directory: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    license: str | None = None,
    also: Callable[[Path], None] | None = None,
    owned: Sequence[str] = (),
) -> Path:
    """Write a compressor as a folder; all of it or nothing.

    The folder is written beside its final place, read back, compared bit by bit, flushed to the disk and
    only then renamed. An exported compressor that stands there already is replaced, and nothing else: notes, `.git` and
    a merged model stay.

    Args:
        compressor: of any registered method; training-free ones have no parameters and are exported too.
        directory: the folder to write.
        card: provenance that belongs on the model card, JSON values only: backbone, data, steps, scores. What the
            compressor was loaded with if None.
        license: identifier for the card, such as "apache-2.0".
        also: writes more into the folder before it gets its name; if None, the tuned LLM that the compressor was
            loaded with is written, too.
        owned: patterns of what it writes, beside `OWNED`; such files of an older export go.

    Returns:
        the folder.

    Raises:
        ArtifactError: something else stands at `directory`, or what was read back differs.
    """
    target = Path(directory)
    check_place(target)
    provenance = dict(compressor.provenance if card is None else card)
    if license is not None:
        provenance["license"] = license
    try:
        with replacing(target, lambda path: is_owned(path, owned)) as staging:
            staging.mkdir()
            _write(compressor, staging, provenance)
            _compare(compressor, load_compressor(staging), target)
            if also is not None:
                also(staging)
            elif compressor.tuned_llm is not None:
                _copy(compressor.tuned_llm, staging / LLM_FOLDER)
            (staging / CARD_FILE).write_text(_card_of(staging), encoding="utf-8")
    except NotOursError as error:
        raise ArtifactError(str(error)) from error
    return target


def is_owned(path: Path, more: Sequence[str] = ()) -> bool:
    """Whether an export writes a file of this path in its folder; `more` are further patterns."""
    return any(fnmatch(path.as_posix(), pattern) for pattern in (*OWNED, *more))


def push_compressor(
    compressor: Compressor,
    repo: str,
    *,
    card: Mapping[str, Any] | None = None,
    license: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload a token compressor",
) -> str:
    """Export a compressor to a repository of the Hugging Face hub, from where `load_compressor(repo)` loads it.

    Args:
        compressor: see `save_compressor`.
        repo: OWNER/NAME; made if it does not exist.
        card, license: see `save_compressor`.
        private: whether a new repository is; the owner's default if None.
        commit_message: of the commit.

    Returns:
        the URL of the commit.

    Raises:
        HubError: the hub cannot be reached, or refuses.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_compressor(compressor, Path(scratch) / "compressor", card=card, license=license)
        return upload(folder, repo, SHARED, commit_message, private)


def load_compressor(source: str | Path, *, revision: str | None = None, **settings: Any) -> Compressor:
    """Load an exported compressor, in evaluation mode.

    Args:
        source: a folder that `save_compressor` wrote, or OWNER/NAME of a repository on the Hugging Face hub; see
            `locate`.
        revision: branch, tag or commit of the repository; its main branch if None.
        **settings: replace exported settings; a new ratio replaces all exported ratios.

    Raises:
        ArtifactError: no such folder, another format, unknown method, damaged weights, or weights that are
            missing, left over or of another shape; names them.
        HubError: see `locate`.
        CompressorError: a setting that the method does not have, or a value that cannot be.
    """
    folder = locate(source, revision)
    config = read_config(folder)
    chosen = dict(config["settings"])
    if any(name in settings for name in RATIOS):
        chosen |= dict.fromkeys(RATIOS)
    compressor = build_compressor(config["method"], hidden_size=config["hidden_size"], **(chosen | settings))
    _load_weights(compressor, folder / WEIGHTS_FILE, config["weights_sha256"])
    compressor.provenance = config.get("provenance", {})
    compressor.tuned_llm = folder / LLM_FOLDER if (folder / LLM_FOLDER).is_dir() else None
    return compressor.eval()


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The folder of an exported compressor; of a repository on the hub its copy in the hub's local cache.

    Args:
        source: a folder, or OWNER/NAME on the hub. Where there is a folder OWNER here it is a path.
        revision: see `load_compressor`.

    Raises:
        ArtifactError: a revision of a folder is asked for.
        HubError: the hub has no such repository, or cannot be reached and the cache lacks it.
    """
    if isinstance(source, str) and is_repo_name(source):
        return fetch(source, SHARED, revision)
    if revision is not None:
        raise ArtifactError(f"{source} is a folder, and revision {revision!r} is of a repository on the hub")
    return Path(source)


def read_config(directory: str | Path) -> dict[str, Any]:
    """The checked `config.json` of an exported compressor.

    Raises:
        ArtifactError: see `load_compressor`.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise ArtifactError(f"{directory} is no exported compressor: {_what_else(Path(directory))}")
    config = read_json(path)
    if config.get("format") != FORMAT:
        raise ArtifactError(f"{path} does not describe an exported compressor (its format is not {FORMAT!r})")
    if config.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {config.get('format_version')}, written by omnisieve "
            f"{config.get('library_version')}; this is {__version__}, which reads version {FORMAT_VERSION}"
        )
    missing = {"method", "settings", "hidden_size", "weights_sha256"} - set(config)
    if missing:
        raise ArtifactError(f"{path} lacks {', '.join(sorted(missing))}; export the compressor again")
    try:
        compressor_type(config["method"])
    except CompressorError as error:
        raise ArtifactError(f"{path}: {error}") from error
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of an export; an empty one if it holds something else.

    Raises:
        ArtifactError: it is no JSON.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}); export the compressor again") from error
    return found if isinstance(found, dict) else {}


def _what_else(directory: Path) -> str:
    if not directory.is_dir():
        return "there is no such folder; tools/export.py RUN OUT exports that of a training run"
    for name in KEPT_OF_A_RUN:
        if is_artifact(directory / name):
            return f"it is the folder of a training run; give {directory / name}"
    return f"it has no {CONFIG_FILE}"


def is_artifact(directory: str | Path) -> bool:
    """Whether a path looks like an exported compressor, without reading it."""
    return (Path(directory) / CONFIG_FILE).is_file() and (Path(directory) / WEIGHTS_FILE).is_file()


def _write(compressor: Compressor, folder: Path, card: dict[str, Any]) -> None:
    weights = {name: value.detach().cpu().contiguous() for name, value in compressor.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "method": compressor.name,
        "settings": asdict(compressor.settings),
        "hidden_size": getattr(compressor, "hidden_size", None),
        "parameters": sum(p.numel() for p in compressor.parameters()),
        "weights_sha256": sha256(folder / WEIGHTS_FILE),
        "provenance": card,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # safetensors makes private files; an export is meant to be shared.
    (folder / WEIGHTS_FILE).chmod(0o644)


def _card_of(folder: Path) -> str:
    tuned = folder / LLM_FOLDER / LLM_CONFIG_FILE
    llm = json.loads(tuned.read_text(encoding="utf-8")) if tuned.is_file() else None
    return model_card(read_config(folder), llm)


def _copy(source: Path, target: Path) -> None:
    """Copy a folder and compare what arrived."""
    shutil.copytree(source, target)
    for path in source.iterdir():
        if sha256(path) != sha256(target / path.name):
            raise ArtifactError(f"{path}: its copy reads back differently")


def _load_weights(compressor: Compressor, path: Path, expected_hash: str) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; export the compressor again")
    if sha256(path) != expected_hash:
        raise ArtifactError(f"{path} is not the file that {CONFIG_FILE} was written with; copy it again")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ArtifactError(f"{path} is no safetensors file ({error})") from error
    if problems := misfits(weights, {name: value.shape for name, value in compressor.state_dict().items()}):
        raise ArtifactError(f"{path} does not fit {compressor.name} so set: {'; '.join(problems)}")
    compressor.load_state_dict(weights, assign=True)


def _compare(written: Compressor, read: Compressor, folder: Path) -> None:
    ours, theirs = written.state_dict(), read.state_dict()
    differing = [name for name in ours if not same(ours[name], theirs[name])]
    if differing or written.settings != read.settings:
        raise ArtifactError(f"{folder}: what was written reads back differently: {differing or 'settings'}")


def check_place(target: Path) -> None:
    """Refuse to export to a place that holds anything but an older export.

    Raises:
        ArtifactError: it does.
    """
    # What cannot be seen may stay: `.git` of a new repository, for example.
    if target.exists() and not (
        target.is_dir() and (is_artifact(target) or all(path.name.startswith(".") for path in target.iterdir()))
    ):
        raise ArtifactError(f"{target} exists and is no exported compressor; move it, or choose another folder")
