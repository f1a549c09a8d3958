"""Stage 2: the language model learns to answer from cached features of the frozen towers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omnisieve.backbones import adapter_for
from omnisieve.data.synthetic.questions import AUDITORY, CROSS, VISUAL, VOCABULARY
from omnisieve.data.synthetic.world import NUMBERS
from testbed_backbone.model import HIDDEN
from testbed_backbone.packing import (
    FAMILIES,
    MEDIA,
    NONE,
    SECOND,
    Batch,
    Packer,
    Record,
    draw_tokens,
    sample_questions,
)

KINDS = {"visual": VISUAL, "cross": CROSS, "auditory": AUDITORY}


@dataclass(frozen=True)
class Phase:
    """One stretch of training with its own budget of tokens."""

    steps: int
    batch: int
    ratio: tuple[float, float]
    """Range of the share of media tokens kept (log-uniform)."""
    questions: int
    lr: float
    warm_up: int = 50
    final_lr: float = 1.0
    """Learning rate at the end, as a share of `lr` (cosine)."""
    auxiliary: float = 0.5
    conversations: float = 0.15
    """Share of steps in which the questions are the turns of one conversation."""

    def factor(self, step: int) -> float:
        """Return the learning rate after `step` steps as a share of `lr`."""
        cosine = 0.5 + 0.5 * np.cos(np.pi * step / self.steps)
        return float(min(1.0, (step + 1) / self.warm_up) * (self.final_lr + (1 - self.final_lr) * cosine))


class Heads(nn.Module):
    """Dense heads on inner states; they break the plateau of the answers and are thrown away afterwards.

    Early states of media tokens tell their second, and every attribute of the event or call that they belong to
    (a beep takes the colour of what is seen with it; an off-screen beep has none). Later states of the word that a
    question asks from tell every attribute of what it names.
    """

    def __init__(self, concepts: dict[str, Tensor]) -> None:
        super().__init__()
        self.media_norm, self.word_norm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.second = nn.Linear(HIDDEN, len(NUMBERS))
        self.media_heads = nn.ModuleDict(
            {name: nn.Linear(HIDDEN, len(words) + 1) for name, words in VOCABULARY.items()}
        )
        self.word_heads = nn.ModuleDict({name: nn.Linear(HIDDEN, len(words)) for name, words in VOCABULARY.items()})
        with torch.no_grad():
            self.second.weight.copy_(torch.stack([concepts[name] for name in NUMBERS]) / HIDDEN**0.5)
            for name, words in VOCABULARY.items():
                start = torch.stack([concepts[word] for word in words]) / HIDDEN**0.5
                self.media_heads[name].weight[:-1] = start
                self.word_heads[name].weight.copy_(start)

    def media(self, states: Tensor, second: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return losses and accuracies for media states [N, D], second [N], labels [N, 6] (NONE, or -1 to skip)."""
        states = self.media_norm(states)
        by_second = self.second(states)
        result = {
            "second": F.cross_entropy(by_second, second),
            "second_accuracy": (by_second.argmax(-1) == second).float().mean(),
        }
        losses = []
        for (name, head), label in zip(self.media_heads.items(), labels.T, strict=True):
            none = head.out_features - 1
            logits, target = head(states), label.where(label != NONE, none)
            weight = torch.ones(none + 1)
            weight[none] = 0.05
            losses.append(F.cross_entropy(logits, target, weight=weight, ignore_index=-1))
            belongs = (target >= 0) & (target < none)
            result[f"{name}_of_media"] = (logits.argmax(-1) == target)[belongs].float().mean()
        result["media"] = torch.stack(losses).sum()
        return result

    def attributes(self, states: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return loss and accuracies for states of question words [Q, D] and attribute labels [Q, 6] (-1: none)."""
        states = self.word_norm(states)
        result, losses = {}, []
        for (name, head), label in zip(self.word_heads.items(), labels.T, strict=True):
            logits = head(states)
            losses.append(F.cross_entropy(logits, label, ignore_index=-1))
            result[f"{name}_of_word"] = (logits.argmax(-1) == label)[label >= 0].float().mean()
        return {"words": torch.stack(losses).sum(), **result}


def run_decoder(model: Any, features: Tensor, batch: Batch) -> Tensor:
    """Return the final states [B, S, D] of a batch.

    Args:
        model: the thinker.
        features: kept media features [B, K, D], in sequence order.
        batch: the packed batch.
    """
    decoder = adapter_for(model).decoder
    head = decoder.embed_tokens(batch.head).expand(len(features), -1, -1)
    embeds = torch.cat([head, features, decoder.embed_tokens(batch.text)], 1)
    return decoder(
        inputs_embeds=embeds,
        position_ids=batch.positions,
        attention_mask={"full_attention": batch.mask},
        use_cache=False,
    ).last_hidden_state


def answer_logits(model: Any, states: Tensor, batch: Batch) -> Tensor:
    """Return logits [N, V] at the rows that predict answers and their ends."""
    return model.lm_head(states[batch.rows[:, 0], batch.rows[:, 1]])


def draw_batch(
    records: list[Record], packer: Packer, phase: Phase, rng: np.random.Generator
) -> tuple[list[Record], Batch]:
    """Return the clips of one step and the batch of their kept tokens and questions."""
    chosen = [records[i] for i in rng.integers(len(records), size=phase.batch)]
    ratio = np.exp(rng.uniform(*np.log(phase.ratio)))
    keep = draw_tokens(chosen, max(24, round(ratio * MEDIA)), rng)
    conversation = bool(rng.random() < phase.conversations)
    offsets = np.where(rng.random(phase.batch) < 0.3, rng.integers(0, 300, phase.batch), 0)
    questions = [sample_questions(r.questions, phase.questions, rng) for r in chosen]
    return chosen, packer.pack(keep, questions, conversation, offsets)


def kept_features(records: list[Record], batch: Batch) -> Tensor:
    """Return the kept media features [B, K, D] of a batch."""
    return torch.stack([r.features[k] for r, k in zip(records, batch.keep, strict=True)]).float()


def step_losses(
    model: Any, heads: Heads, records: list[Record], batch: Batch, early: dict[int, Tensor]
) -> dict[str, Tensor]:
    """Return losses (`answer`, `end`, `second`, `media`, `words`) and accuracies of one forward pass.

    Args:
        model: the thinker.
        heads: the dense heads.
        records: the clips of the batch.
        batch: the packed batch.
        early: filled by hooks during the forward: layer -> states [B, S, D]; the first layer is read at media tokens,
            the last at the words that questions ask from.
    """
    states = run_decoder(model, kept_features(records, batch), batch)
    logits = answer_logits(model, states, batch)
    answer = batch.families >= 0
    first, kept = len(batch.head), batch.keep.shape[1]
    media = early[min(early)][:, first : first + kept].flatten(0, 1)
    labels = torch.stack([torch.from_numpy(r.labels)[k] for r, k in zip(records, batch.keep, strict=True)])
    words = early[max(early)][batch.keys[:, 0], batch.keys[:, 1]]
    asked = np.stack([records[i].attributes[group] for i, group in batch.groups.tolist()])
    hits = (logits.argmax(-1) == batch.labels)[answer].float()
    families = batch.families[answer].tolist()
    return {
        "answer": F.cross_entropy(logits[answer], batch.labels[answer]),
        "end": F.cross_entropy(logits[~answer], batch.labels[~answer]),
        **heads.media(media, torch.from_numpy(SECOND)[batch.keep].flatten(), labels.flatten(0, 1)),
        **heads.attributes(words, torch.from_numpy(asked)),
        **{kind: hits[[FAMILIES[f] in names for f in families]].mean() for kind, names in KINDS.items()},
    }


def train_language_model(
    model: Any,
    heads: Heads,
    packer: Packer,
    records: list[Record],
    phase: Phase,
    log: Callable[..., None],
    seed: int,
    depths: tuple[int, int],
) -> None:
    """Train decoder, embeddings and `lm_head` for one phase; `depths` says after which layers the heads read."""
    decoder = adapter_for(model).decoder
    parameters = [*decoder.parameters(), *model.lm_head.parameters(), *heads.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=phase.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, phase.factor)
    rng = np.random.default_rng(seed)
    early: dict[int, Tensor] = {}
    hooks = [
        decoder.layers[depth - 1].register_forward_hook(lambda _m, _i, out, d=depth: early.__setitem__(d, out))
        for depth in depths
    ]
    window: dict[str, list[float]] = {}
    model.train()
    for step in range(1, phase.steps + 1):
        chosen, batch = draw_batch(records, packer, phase, rng)
        values = step_losses(model, heads, chosen, batch, early)
        dense = values["second"] + (values["media"] + values["words"]) / 3
        loss = values["answer"] + 0.1 * values["end"] + phase.auxiliary * dense
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        for name, value in values.items():
            window.setdefault(name, []).append(value.item())
        if step % 25 == 0 or step == phase.steps:
            log(stage="language", step=step, **{n: round(float(np.nanmean(v)), 3) for n, v in window.items()})
            window.clear()
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def evaluate(
    model: Any,
    packer: Packer,
    records: list[Record],
    keeps: list[np.ndarray] | None = None,
    conversation: bool = False,
    chunk: int = 8,
) -> dict[str, float]:
    """Return accuracy in percent per family and over all questions (`all`).

    Args:
        model: the thinker.
        packer: builds the sequences.
        records: clips with the questions to ask.
        keeps: kept media tokens of each clip [K]; all when None. Those of neighbouring clips must be equally many.
        conversation: ask a clip's questions as turns of one conversation (with the true earlier answers) instead of
            one at a time.
        chunk: clips per forward.
    """
    model.eval()
    hits = {family: [] for family in FAMILIES}  # type: dict[str, list[bool]]
    for i in range(0, len(records), chunk):
        part = records[i : i + chunk]
        keep = np.stack([np.arange(MEDIA)] * len(part) if keeps is None else keeps[i : i + chunk])
        batch = packer.pack(keep, [r.questions for r in part], conversation)
        logits = answer_logits(model, run_decoder(model, kept_features(part, batch), batch), batch)
        right = logits.argmax(-1) == batch.labels
        for row in range(0, len(right), 2):
            hits[FAMILIES[int(batch.families[row])]].append(bool(right[row] and right[row + 1]))
    result = {family: round(100 * float(np.mean(h)), 2) for family, h in hits.items() if h}
    result["all"] = round(100 * float(np.mean(np.concatenate([h for h in hits.values() if h]))), 2)
    return result
