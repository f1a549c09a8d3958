"""What training changed of an LLM, beside the compressor that was trained with it: the folder `llm` of an export.

It holds safetensors and a JSON description: low-rank adapters, or, of an LLM that was tuned as a whole, decoder and
head. Names of tensors do not depend on the module tree of a transformers version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omnisieve.artifact import LLM_CONFIG_FILE, LLM_FOLDER, ArtifactError, locate, read_config, read_json
from omnisieve.backbones import Adapter, BackboneError, adapter_for
from omnisieve.backbones.loading import Precision, load_backbone
from omnisieve.backbones.media import load_processor
from omnisieve.backbones.tuning import (
    LoraVariants,
    add_lora,
    fingerprint,
    load_trained,
    remove_lora,
    train_all,
    trainable,
)
from omnisieve.config import ConfigError, LoraSection
from omnisieve.files import sha256
from omnisieve.ops.tensors import as_bytes, same

WEIGHTS_FILE = "tuned_llm.safetensors"
FORMAT_VERSION = 1
_SHARD = "5GB"


@dataclass(frozen=True)
class TunedLlm:
    """What training changed of an LLM.

    Attributes:
        mode: "lora": adapters; "full": all of decoder and head.
        base: path or name of the LLM that it was made from.
        tensors: under the names of `backbones.tuning.trainable`, on the host.
        lora: what the adapters were made with; None in mode "full".
        fingerprint: of the LLM that adapters belong to, see `backbones.tuning.fingerprint`; None in mode "full", which
            leaves nothing of it.
    """

    mode: Literal["lora", "full"]
    base: str
    tensors: Mapping[str, Tensor]
    lora: LoraSection | None = None
    fingerprint: str | None = None

    def check(self, adapter: Adapter) -> None:
        """Refuse an LLM of the same shape that is another one.

        Raises:
            BackboneError: it is.
        """
        if self.fingerprint not in (None, fingerprint(adapter)):
            raise BackboneError(
                f"the adapters were trained on {self.base}, and this LLM has other weights (adapters merged into it, "
                "for example): load the LLM that the training started from"
            )

    def save(self, export: Path) -> None:
        """Write the folder `llm` into an export, and read it back.

        Raises:
            ArtifactError: what was read back differs.
        """
        folder = export / LLM_FOLDER
        folder.mkdir()
        save_file({name: value.contiguous() for name, value in self.tensors.items()}, folder / WEIGHTS_FILE)
        (folder / WEIGHTS_FILE).chmod(0o644)
        config = {
            "format_version": FORMAT_VERSION,
            "mode": self.mode,
            "base": self.base,
            "lora": None if self.lora is None else asdict(self.lora),
            "fingerprint": self.fingerprint,
            "weights_sha256": sha256(folder / WEIGHTS_FILE),
        }
        (folder / LLM_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        read = load_file(folder / WEIGHTS_FILE)
        different = [name for name, value in self.tensors.items() if name not in read or not same(value, read[name])]
        if different or read.keys() != self.tensors.keys():
            raise ArtifactError(f"{folder}: what was written reads back differently: {different or 'names'}")


def has_tuned_llm(export: str | Path) -> bool:
    """Whether an exported compressor was trained together with its LLM.

    Args:
        export: see `read_tuned_llm`.
    """
    return (locate(export) / LLM_FOLDER / LLM_CONFIG_FILE).is_file()


def read_tuned_llm(export: str | Path) -> TunedLlm:
    """Read what an export says of its LLM.

    Args:
        export: its folder, or OWNER/NAME on the hub.

    Raises:
        ArtifactError: there is no export, or nothing of the kind in it, or it is damaged.
    """
    config = describe_tuned_llm(export)
    path = locate(export) / LLM_FOLDER / WEIGHTS_FILE
    if not path.is_file() or sha256(path) != config["weights_sha256"]:
        raise ArtifactError(f"{path} is missing or not the file that {LLM_CONFIG_FILE} was written with; copy it again")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ArtifactError(f"{path} is no safetensors file ({error})") from error
    return TunedLlm(config["mode"], config["base"], tensors, config["lora"], config["fingerprint"])


def describe_tuned_llm(export: str | Path) -> dict[str, Any]:
    """What an export says of its LLM without reading the weights: "mode", "base", "lora", "fingerprint" and
    "weights_sha256".

    Args:
        export: see `read_tuned_llm`.

    Raises:
        ArtifactError: see `read_tuned_llm`.
    """
    folder = locate(export)
    read_config(folder)
    path = folder / LLM_FOLDER / LLM_CONFIG_FILE
    if not path.is_file():
        raise ArtifactError(f"{export} holds no tuned LLM: its compressor was trained on a frozen one")
    return _read_config(path)


def tune_llm(model: nn.Module, export: str | Path) -> None:
    """Turn a stock model into the one that an exported compressor was trained with, for good; it is frozen then.

    Adapters are merged: in float32 that changes logits by rounding alone, in bfloat16 the merged weights are rounded
    to 8 bits, and answers may differ from those of `tuned_llm`, which are those of the training.

    Args:
        model: the LLM that the training started from; see `backbones.adapter_for`.
        export: see `read_tuned_llm`.

    Raises:
        ArtifactError: see `read_tuned_llm`. BackboneError: the weights do not fit the model, which stays as it was.
    """
    apply_tuned(model, read_tuned_llm(export))


def apply_tuned(model: nn.Module, tuned: TunedLlm) -> None:
    """What `tune_llm` does, with what was read already."""
    adapter = adapter_for(model)
    if tuned.lora is None:
        train_all(adapter)
        load_trained(trainable(adapter), tuned.tensors)
    else:
        handle = add_lora(adapter, tuned.lora)
        try:
            load_trained(trainable(adapter), tuned.tensors)
            tuned.check(adapter)
        except BackboneError:
            remove_lora(adapter, handle, merge=False)
            raise
        remove_lora(adapter, handle, merge=True)
    model.requires_grad_(False)


def save_tuned_model(
    export: str | Path,
    folder: Path,
    base: str | Path | None = None,
    dtype: Precision | None = None,
    note: Callable[[str], None] = print,
) -> None:
    """Write the LLM that an exported compressor was trained with as a stock model, with its processor.

    It is read back and compared. One model is in memory at a time.

    Args:
        export: see `read_tuned_llm`.
        folder: to write; `load_backbone` and transformers read it as a thinker.
        base: folder or hub name of the LLM that the training started from; as the export says if None.
        dtype: of the weights; if None, that in which the base is stored, or in which an LLM was tuned as a whole.
            See `tune_llm` for adapters in bfloat16.
        note: is told what is being done.

    Raises:
        ArtifactError: see `read_tuned_llm`; or what was read back differs. BackboneError: the base is not there, or
            the weights do not fit it.
    """
    tuned = read_tuned_llm(export)
    base = base or tuned.base
    # Before the model is loaded: a missing file should show at once.
    processor = load_processor(base)
    note(f"reading {base}")
    model = load_backbone(base, dtype or _precision(tuned))
    note("merging its adapters" if tuned.lora is not None else "putting in its layers, embeddings and head")
    apply_tuned(model, tuned)
    expected = _digests(model)
    size = sum(parameter.numel() for parameter in model.parameters())
    note(f"writing {size / 1e9:.3g} billion parameters in {model.dtype}")
    model.save_pretrained(folder, max_shard_size=_SHARD)
    processor.save_pretrained(folder)
    del model
    note("reading it back")
    found = _digests(load_backbone(folder, "auto"))
    if different := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
        raise ArtifactError(f"{folder}: what was written reads back differently: {', '.join(different[:8])}")


def _precision(tuned: TunedLlm) -> Precision:
    float32 = any(value.dtype == torch.float32 for value in tuned.tensors.values())
    return "auto" if tuned.lora is not None else "float32" if float32 else "bfloat16"


def _digests(model: nn.Module) -> dict[str, tuple[str, str]]:
    """What tells the weights of two models apart, of which only one is in memory."""
    return {
        name: (f"{value.dtype} {tuple(value.shape)}", hashlib.sha256(as_bytes(value).numpy().data).hexdigest())
        for name, value in model.state_dict().items()
    }


@contextmanager
def tuned_llm(model: nn.Module, export: str | Path) -> Iterator[None]:
    """Inside, a stock model has the adapters that an exported compressor was trained with; outside, it has not.

    Args:
        model: see `tune_llm`.
        export: see `read_tuned_llm`.

    Raises:
        ArtifactError: see `read_tuned_llm`; or the LLM was tuned as a whole. BackboneError: see `tune_llm`; or it has
            adapters already.
    """
    variants = LoraVariants(adapter_for(model))
    try:
        with variants.speaking(add_variant(variants, export)):
            yield
    finally:
        variants.remove()


def add_variant(variants: LoraVariants, export: str | Path) -> str:
    """Add the adapters of an export to those of a model; returns their name there.

    Raises:
        see `tuned_llm`.
    """
    lora = lora_of(export)
    tuned = read_tuned_llm(export)
    name = variants.add(lora, tuned.tensors)
    tuned.check(variants.adapter)
    return name


def lora_of(export: str | Path) -> LoraSection:
    """What the adapters of an export were made with.

    Raises:
        ArtifactError: there is no tuned LLM, or it was tuned as a whole, which a model cannot put on and off.
    """
    lora = describe_tuned_llm(export)["lora"]
    if lora is None:
        raise ArtifactError(
            f"{export} holds an LLM that was tuned as a whole, which no loaded model can put on and off: write it as "
            f"a model of its own with `tools/export.py {export} OUT --merge`, then use OUT and give OUT/model as the "
            "LLM (model.path)"
        )
    return lora


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if config.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(f"{path} does not describe a tuned LLM in format version {FORMAT_VERSION}")
    try:
        lora = None if config["mode"] == "full" else LoraSection(**config["lora"])
        return {name: config[name] for name in ("mode", "base", "fingerprint", "weights_sha256")} | {"lora": lora}
    except (KeyError, TypeError, ConfigError) as error:
        raise ArtifactError(f"{path} does not describe a tuned LLM ({error!r}); export again") from error
