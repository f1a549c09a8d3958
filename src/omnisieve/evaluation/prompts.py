"""Questions of clips as one left-padded prompt, and the stock `generate` on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from omnisieve.backbones import Adapter
from omnisieve.compressors import Need
from omnisieve.data.batch import Batch, Features, Sample
from omnisieve.data.collate import collate


@dataclass(frozen=True)
class Prompt:
    """Questions that are asked together, with their media merged in.

    Attributes:
        batch: what was collated, left-padded to S, with encoder outputs instead of pixels and mel spectrograms.
        embeds: [B, S, D].
        needs: encoder statistics that any method declared, [B, S] each.
    """

    batch: Batch
    embeds: Tensor
    needs: Mapping[Need, Tensor]

    @property
    def features(self) -> Features:
        """Encoder outputs of all questions, in batch order; empty without media."""
        return self.batch.features or Features()

    def with_features(self, adapter: Adapter, features: Features) -> Prompt:
        """The same questions about other media of the same sizes."""
        return replace(
            self,
            batch=replace(self.batch, features=features),
            embeds=adapter.merge(self.batch.input_ids, features),
        )


def make_prompt(
    adapter: Adapter, clips: Sequence[Sequence[Sample]], *, pad_token_id: int, needs: Sequence[Need] = ()
) -> Prompt:
    """Run the encoders once per clip and put all questions into one batch.

    Args:
        adapter: of the model; the prompt is made on its device.
        clips: per clip its questions, about the clip's media or the first few of them.
        pad_token_id: of the tokenizer.
        needs: statistics to take from the encoders.
    """
    device = adapter.thinker.device
    pad = partial(collate, pad_token_id=pad_token_id, ids_per_window=adapter.token_rules().ids_per_chunk)
    samples: list[Sample] = []
    for questions in clips:
        for _, group in groupby(questions, key=_media_items):
            first, *others = group
            features = adapter.encode(pad([first]).to(device), needs)
            samples += [replace(q, features=features, videos=(), images=(), audios=()) for q in (first, *others)]
    batch = pad(samples, padding_side="left").to(device)
    features = batch.features or Features()
    return Prompt(batch, adapter.merge(batch.input_ids, features), adapter.needs(features, batch.layout, needs))


def _media_items(question: Sample) -> int:
    return int(question.tokens.item.max(initial=-1)) + 1


def generate(adapter: Adapter, prompt: Prompt, max_new_tokens: int) -> Tensor:
    """New token ids [B, <= max_new_tokens], greedily; rows that end early are filled with the padding id."""
    ids = prompt.batch.input_ids
    written = adapter.thinker.generate(**_inputs(prompt), max_new_tokens=max_new_tokens, **_GREEDY)
    return written[:, ids.shape[1] :]


def next_token_logits(adapter: Adapter, prompt: Prompt) -> Tensor:
    """Logits [B, V] of the first token of each answer."""
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    return adapter.thinker.generate(**_inputs(prompt), **options, **_GREEDY).logits[0]


# A checkpoint's own generation settings may sample or penalise repetition.
_GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}


def _inputs(prompt: Prompt) -> dict[str, Tensor]:
    batch = prompt.batch
    sequence = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {
        "input_ids": batch.input_ids,
        "inputs_embeds": prompt.embeds,
        "attention_mask": batch.attention_mask,
        # `generate` carries the sequence's own ids before the three rope rows.
        "position_ids": torch.cat([sequence[None], batch.position_ids]),
    }
