"""The model card of an exported compressor: what the hub shows, and what a finder of the folder reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from omnisieve.hub import is_repo_name

_CARD = """\
---
{header}---
# {method}, a token compressor

Decides which video and audio tokens an omni-modal LLM sees. It holds {parameters:,} parameters and none of
the LLM's; it fits LLMs whose embeddings are {width} wide.{llm}

```python
from omnisieve import attach, load_compressor, prepare{imported}

compressor = load_compressor(SOURCE)  # this folder, or OWNER/NAME on the hub; retained_ratio=0.35 sets another ratio
{before}with {context}attach(model, compressor.to(model.device)):
    model.generate(**prepare(model, processor, "clip.mp4", "What is heard?"), max_new_tokens=256, do_sample=False)
```

## Settings
{settings}

## Provenance
{provenance}

Written by omnisieve {version}.
"""


_LLM = """ It was trained together with the LLM {base}, and for no other:
the folder `llm` holds {what}."""
# What the usage of an export with a tuned LLM needs beside that of others.
_USES = {
    "lora": {
        "what": "low-rank adapters, which `tuned_llm` puts on and off",
        "imported": ", tuned_llm",
        "context": "tuned_llm(model, SOURCE), ",
        "before": "",
    },
    "full": {
        "what": "its layers, embeddings and head, which `tune_llm` puts in for good",
        "imported": ", tune_llm",
        "context": "",
        "before": "tune_llm(model, SOURCE)\n",
    },
}


def model_card(config: Mapping[str, Any], llm: Mapping[str, Any] | None = None) -> str:
    """The text of an export's README.md.

    Args:
        config: of the export.
        llm: description of the LLM that was tuned with it, if one was.
    """
    provenance = config["provenance"]
    return _CARD.format(
        **_usage(llm),
        header=yaml.safe_dump(_header(config["method"], provenance), sort_keys=False),
        method=config["method"],
        parameters=config["parameters"],
        width=config["hidden_size"] or "any number of values",
        settings=_table({k: v for k, v in config["settings"].items() if v is not None}),
        provenance=_table(provenance) if provenance else "Not recorded.",
        version=config["library_version"],
    )


def _usage(llm: Mapping[str, Any] | None) -> dict[str, str]:
    """What a card says of an LLM that was tuned, too."""
    if llm is None:
        return dict.fromkeys(("llm", "imported", "context", "before"), "")
    uses = _USES[llm["mode"]]
    return {**uses, "llm": _LLM.format(base=llm["base"], what=uses["what"])}


def _header(method: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub reads of a card. Its base model is a repository; a backbone in a folder has no name there."""
    header: dict[str, Any] = {"library_name": "omnisieve", "tags": ["omnisieve", "token-compression", method]}
    backbone = provenance.get("backbone")
    if isinstance(backbone, str) and is_repo_name(backbone):
        header["base_model"] = backbone
    if "license" in provenance:
        header["license"] = provenance["license"]
    return header


def _table(values: Mapping[str, Any]) -> str:
    rows = (f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in values.items())
    return "\n".join(["| name | value |", "|---|---|", *rows])
