"""Weights that others published, in their own layout: the OmniSIFT checkpoint (arXiv 2602.04804).

It is a whole Qwen2.5-Omni whose LLM was trained together with the audio selector; the selector's tensors are named
`thinker.compressor.*`. Only they are read, so a checkpoint of any size costs a few MB of memory.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omnisieve.artifact import ArtifactError
from omnisieve.compressors import Compressor, build_compressor, find_preset
from omnisieve.compressors.omnisift import OmniSift
from omnisieve.ops.tensors import misfits

PREFIX = "thinker.compressor."
OMNISIFT_PRESET = "omnisift/7b/code"
INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
PICKLED = (".bin", ".pt", ".pth")
_PUBLISHED = {
    "video_pruner": "similarity",
    "score_norm": "none",
    "rounding": "official",
    "chunks": "pair_grids",
}
_PROJECTIONS = ("v_proj.weight", "a_proj.weight")

Load = Callable[[], Tensor]


def import_omnisift(checkpoint: str | Path, preset: str = OMNISIFT_PRESET, **settings: Any) -> Compressor:
    """The compressor of a published OmniSIFT checkpoint; it selects what the published code selects.

    Args:
        checkpoint: a folder of safetensors shards with their index or of one safetensors file, a safetensors file, or
            a state dict that torch saved.
        preset: the ratios, see `omnisieve.list_presets`; those of the published code unless given.
        **settings: replace those of the published code.

    Returns:
        the compressor, in evaluation mode and in the precision of the checkpoint. Its `provenance` says what it was
        imported from, and under "LLM" that the LLM in the checkpoint was not.

    Raises:
        ArtifactError: the checkpoint cannot be read, or a tensor of the compressor is missing, left over, or of another
            shape or precision than the others; names it.
        CompressorError: see `build_compressor`.
    """
    path = Path(checkpoint)
    tensors = tensors_of(path)
    weights = _compressor_weights(tensors, path)
    values = find_preset(preset).of("omnisift", _PUBLISHED | settings)
    compressor = build_compressor("omnisift", hidden_size=_hidden_size(weights, path), **values)
    assert isinstance(compressor, OmniSift)  # its name says so
    expected = {PREFIX + name: value for name, value in compressor.selector.state_dict().items()}
    if problems := misfits(weights, {name: value.shape for name, value in expected.items()}):
        raise ArtifactError(f"{path} does not hold the published selector: {'; '.join(problems)}")
    precisions = {value.dtype for value in weights.values()}
    if len(precisions) > 1 or not precisions.pop().is_floating_point:
        each = ", ".join(f"{name} {value.dtype}" for name, value in weights.items())
        raise ArtifactError(f"{path}: the compressor's tensors are not all of one floating-point precision: {each}")
    compressor.selector.load_state_dict({name.removeprefix(PREFIX): w for name, w in weights.items()}, assign=True)
    compressor.provenance = _provenance(path, preset, tensors)
    return compressor.eval()


def tensors_of(checkpoint: Path) -> Mapping[str, Load]:
    """The tensors of a checkpoint by name, each to be loaded by calling it.

    Raises:
        ArtifactError: there is no checkpoint that can be read without executing what it holds.
    """
    if checkpoint.is_dir() and (checkpoint / INDEX_FILE).is_file():
        return _sharded(checkpoint)
    file = checkpoint / SINGLE_FILE if checkpoint.is_dir() else checkpoint
    if not file.is_file():
        reason = f"holds neither {INDEX_FILE} nor {SINGLE_FILE}" if checkpoint.is_dir() else "does not exist"
        raise ArtifactError(f"{checkpoint} {reason}; give the folder of a safetensors checkpoint, or one file")
    if file.suffix in PICKLED:
        return _pickled(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: partial(_read, file, name) for name in tensors.keys()}  # noqa: SIM118  it is no mapping
    except SafetensorError as error:
        raise ArtifactError(
            f"{file} is no safetensors file ({error}), and its name ends in none of {', '.join(PICKLED)}"
        ) from error


def _sharded(folder: Path) -> Mapping[str, Load]:
    index = folder / INDEX_FILE
    try:
        shards = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{index} is no index of safetensors shards: {error!r}") from error
    for shard in shards.values():
        if Path(shard).name != shard:
            raise ArtifactError(f"{index} names {shard!r}, which is no file of its folder")
    return {name: partial(_read, folder / shard, name) for name, shard in shards.items()}


def _read(file: Path, name: str) -> Tensor:
    if not file.is_file():
        raise ArtifactError(f"{file} is missing; it holds {name}")
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)
    except SafetensorError as error:
        raise ArtifactError(f"{file} does not give {name}: {error}") from error


def _pickled(file: Path) -> Mapping[str, Load]:
    try:
        # Mapped into memory, of which only what is used is read.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ArtifactError(
            f"{file} is not a state dict that torch.save wrote (1.6 or later), or holds more than tensors, which is "
            "not read because it could execute anything; convert it to safetensors"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ArtifactError(f"{file} holds something else than a state dict: names and their tensors")
    return {name: value.clone for name, value in state.items()}


def _compressor_weights(tensors: Mapping[str, Load], path: Path) -> dict[str, Tensor]:
    """The compressor's tensors, named without what wrappers put in front: `module.`, `model.` and the like."""
    found: dict[str, str] = {}
    for name in tensors:
        if f".{PREFIX}" not in f".{name}":
            continue
        short = PREFIX + f".{name}".partition(f".{PREFIX}")[2]
        if short in found:
            raise ArtifactError(f"{path} holds {short} twice, as {found[short]} and {name}; leave out one of them")
        found[short] = name
    if not found:
        raise ArtifactError(f"{path} holds no {PREFIX}* tensor, so it is no OmniSIFT checkpoint")
    return {short: tensors[name]() for short, name in found.items()}


def _hidden_size(weights: Mapping[str, Tensor], path: Path) -> int:
    """Width of the embeddings: what both projections take."""
    shapes = {name: tuple(weights[PREFIX + name].shape) for name in _PROJECTIONS if PREFIX + name in weights}
    if not shapes:
        raise ArtifactError(f"{path} lacks {' and '.join(PREFIX + name for name in _PROJECTIONS)}")
    if len({shape[-1:] for shape in shapes.values()}) > 1 or not all(shapes.values()):
        each = ", ".join(f"{PREFIX}{name} {shape}" for name, shape in shapes.items())
        raise ArtifactError(f"{path}: the projections do not take embeddings of one width: {each}")
    return next(iter(shapes.values()))[-1]


def _provenance(path: Path, preset: str, tensors: Mapping[str, Load]) -> dict[str, Any]:
    provenance: dict[str, Any] = {"imported from": str(path), "ratios of": preset}
    llm = [name for name in tensors if "thinker." in name and PREFIX not in name]
    if llm:
        provenance["LLM"] = (
            f"not imported: the checkpoint also holds {len(llm)} tensors of the LLM that learned together with the "
            "compressor, which wants that LLM: give the checkpoint as model.path, too"
        )
    return provenance
