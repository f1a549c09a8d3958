"""Questions of clips as prompts with their media merged in, and the stock `generate` on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from omnisieve.backbones import Adapter
from omnisieve.compressors import Need
from omnisieve.data.batch import Batch, Features, Sample
from omnisieve.data.collate import collate
from omnisieve.evaluation.benchmarks import Clip


@dataclass(frozen=True)
class Prompt:
    """Questions that are asked together, all S tokens long.

    Attributes:
        clips: [B], the clip that each question is about.
        batch: what was collated, with encoder outputs instead of pixels and mel spectrograms.
        embeds: [B, S, D].
        needs: encoder statistics that any method declared, [B, S] each.
    """

    clips: tuple[str, ...]
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


def make_prompts(
    adapter: Adapter,
    clips: Sequence[Clip],
    *,
    pad_token_id: int,
    needs: Sequence[Need] = (),
    max_tokens: int | None = None,
) -> Iterator[Prompt]:
    """Run the encoders once per clip and put the questions into batches of equal length, one batch at a time.

    Equal length, because attention without padding needs no mask, and its kernels are faster without one.

    Args:
        adapter: of the model; the prompts are made on its device.
        clips: with questions about all of the clip's media or the first few of them.
        pad_token_id: of the tokenizer.
        needs: statistics to take from the encoders.
        max_tokens: of a batch, B * S, unless a single question is longer; None: no limit.
    """
    device = adapter.thinker.device
    pad = partial(collate, pad_token_id=pad_token_id, ids_per_window=adapter.token_rules().ids_per_chunk)
    samples: list[tuple[str, Sample]] = []
    for clip in clips:
        for _, same_media in groupby(clip.questions, key=_media_items):
            questions = list(same_media)
            features = adapter.encode(pad(questions[:1]).to(device), needs)
            samples += [(clip.id, replace(q, features=features, videos=(), images=(), audios=())) for q in questions]
    for length, same_length in groupby(sorted(samples, key=_length), key=_length):
        equally_long = list(same_length)
        size = len(equally_long) if max_tokens is None else max(max_tokens // length, 1)
        for start in range(0, len(equally_long), size):
            names, chosen = zip(*equally_long[start : start + size], strict=True)
            batch = pad(chosen).to(device)
            features = batch.features or Features()
            embeds = adapter.merge(batch.input_ids, features)
            yield Prompt(names, batch, embeds, adapter.needs(features, batch.layout, needs))


def _length(entry: tuple[str, Sample]) -> int:
    return len(entry[1].input_ids)


def _media_items(question: Sample) -> int:
    return int(question.tokens.item.max(initial=-1)) + 1


def generate(adapter: Adapter, prompt: Prompt, max_new_tokens: int, *, eos_token_id: int, pad_token_id: int) -> Tensor:
    """New token ids [B, <= max_new_tokens], greedily.

    Args:
        adapter: of the model.
        prompt: to answer.
        max_new_tokens: of an answer.
        eos_token_id: of the tokenizer; it ends an answer, as do the end tokens that the model itself knows.
        pad_token_id: of the tokenizer; fills rows that end early.
    """
    own = adapter.thinker.generation_config.eos_token_id
    ends = {eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])}
    options = {"max_new_tokens": max_new_tokens, "eos_token_id": sorted(ends), "pad_token_id": pad_token_id}
    with _last_logits_only(adapter), adapter.deepstack(prompt.features, prompt.batch.layout):
        written = adapter.thinker.generate(**_inputs(prompt), **options, **_GREEDY)
    return written[:, prompt.batch.input_ids.shape[1] :]


def next_token_logits(adapter: Adapter, prompt: Prompt) -> Tensor:
    """Logits [B, V] of the first token of each answer."""
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    with _last_logits_only(adapter), adapter.deepstack(prompt.features, prompt.batch.layout):
        return adapter.thinker.generate(**_inputs(prompt), **options, **_GREEDY).logits[0]


@contextmanager
def _last_logits_only(adapter: Adapter) -> Iterator[None]:
    """Run the head on the last position only; the stock prefill runs it on all, gigabytes at a real vocabulary."""
    hook = adapter.lm_head.register_forward_pre_hook(lambda _, args: (args[0][:, -1:], *args[1:]))
    try:
        yield
    finally:
        hook.remove()


# A checkpoint's own generation settings may sample or penalise repetition.
_GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}


def _inputs(prompt: Prompt) -> dict[str, Tensor]:
    batch = prompt.batch
    # `generate` carries the sequence's own ids before the three rope rows.
    sequence = torch.arange(batch.layout.length, device=batch.input_ids.device).expand(1, len(batch), -1)
    return {
        "input_ids": batch.input_ids,
        "inputs_embeds": prompt.embeds,
        "attention_mask": batch.attention_mask,
        "position_ids": torch.cat([sequence, batch.position_ids]),
    }
