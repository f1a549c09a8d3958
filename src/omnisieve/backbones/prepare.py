"""From media files and a question to the inputs of a stock model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from omnisieve.backbones.adapter import adapter_for
from omnisieve.backbones.media import reader
from omnisieve.config import MediaSection
from omnisieve.data.collate import collate
from omnisieve.data.errors import DataError
from omnisieve.data.kinds import kind_of
from omnisieve.data.manifest import Conversation, MediaPart, no_path

Media = str | Path | Sequence[str | Path]


def prepare(
    model: nn.Module,
    processor: ProcessorMixin,
    media: Media,
    question: str,
    *,
    system: str | None = None,
    settings: MediaSection | None = None,
) -> dict[str, Tensor]:
    """What a stock thinker's `generate` takes to answer one question, read as training and evaluation read it.

    Args:
        model: see `adapter_for`.
        processor: of the model, see `load_processor`.
        media: a video (its own sound comes with it), a sound or an image, by its content; or several, in order.
        question: about them.
        system: system message placed before the question. None sends none, and the chat template may then put in a
            sentence of its own. Published examples of Qwen2.5-Omni send "You are Qwen, a virtual human ..." themselves:
            do not count on the template, give it here to repeat a result that was made with it.
        settings: how densely videos are sampled, and so on; None takes the defaults, which are those of qwen_omni_utils
            for models with the vocabulary of the released ones, and those of the processor for others.

    Returns:
        input_ids, attention_mask and the rest, on the model's device. The answer is what `generate` adds behind
        `input_ids`.

    Raises:
        BackboneError: a model that is not supported.
        ConfigError: settings that contradict each other.
        DataError: a file cannot be read, what is given is no path, or the question holds a mark of a chat template; the
            message names the cure.
    """
    adapter = adapter_for(model)
    loader = reader(processor, adapter, settings or MediaSection())
    files = [media] if isinstance(media, str | Path) else media
    parts = tuple(map(_part, files))
    content = [*({"type": part.kind} for part in parts), {"type": "text", "text": question}]
    before = () if system is None else ({"role": "system", "content": system},)
    asked = Conversation("question", (*before, {"role": "user", "content": content}), parts)
    sample = loader.sample(asked, loader.load(asked), generation_prompt=True)
    batch = collate([sample], pad_token_id=int(loader.preprocessor.tokenizer.pad_token_id)).to(adapter.thinker.device)
    # `generate` carries the sequence's own ids before the three rope rows.
    sequence = torch.arange(batch.layout.length, device=batch.input_ids.device).expand(1, 1, -1)
    return batch.model_inputs() | {"position_ids": torch.cat([sequence, batch.position_ids])}


def _part(file: str | Path) -> MediaPart:
    if isinstance(file, str) and (problem := no_path(file)) is not None:
        raise DataError(f"media: {problem}")
    # What is no medium is told by whoever decodes it.
    return MediaPart(kind_of(file) or "video", Path(file))
