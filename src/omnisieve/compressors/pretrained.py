"""What users of transformers look for on a model: `save_pretrained`, `from_pretrained` and `push_to_hub`.

How a compressor is stored is known to `omnisieve.artifact`, one floor up. These methods are names for its functions
and import it when they are called; nothing else below does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from omnisieve.compressors.ratios import CompressorError

if TYPE_CHECKING:
    from omnisieve.compressors.base import Compressor


class Pretrained:
    """Saving, loading and sharing, as methods.

    Attributes:
        provenance: what the card of an export says of where the weights come from; it travels from loading to saving.
        tuned_llm: folder of what training changed of the LLM, in the export that this was loaded from; None where the
            LLM was frozen. It travels, too.
    """

    provenance: Mapping[str, Any] = {}
    tuned_llm: Path | None = None

    def save_pretrained(
        self, directory: str | Path, *, card: Mapping[str, Any] | None = None, license: str | None = None
    ) -> Path:
        """Write the compressor as a folder. See `omnisieve.save_compressor`."""
        from omnisieve.artifact import save_compressor

        return save_compressor(cast("Compressor", self), directory, card=card, license=license)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, **settings: Any) -> Self:
        """Load an exported compressor of this class, or of any method if called on `Compressor`.

        See `omnisieve.load_compressor`.

        Raises:
            CompressorError: also if another method was exported.
        """
        from omnisieve.artifact import load_compressor

        loaded = load_compressor(source, revision=revision, **settings)
        if not isinstance(loaded, cls):
            raise CompressorError(f"{source} holds {loaded.name}, not {cls.__name__}: use load_compressor({source!r})")
        return loaded

    def push_to_hub(
        self,
        repo: str,
        *,
        card: Mapping[str, Any] | None = None,
        license: str | None = None,
        private: bool | None = None,
        commit_message: str = "Upload a token compressor",
    ) -> str:
        """Export the compressor to a repository of the Hugging Face hub. See `omnisieve.push_compressor`."""
        from omnisieve.artifact import push_compressor

        return push_compressor(
            cast("Compressor", self), repo, card=card, license=license, private=private, commit_message=commit_message
        )
