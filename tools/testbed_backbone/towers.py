"""Stage 1: the towers learn to name what each media token shows or sounds.

Each tower's output is pulled towards a mix of concept vectors. The vectors of words are also where the word
embeddings of the language model start, as after an alignment stage; the vectors of textures, tints and chirps
make the towers represent distractors too, so that selection by similarity meets them in their variety.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from omnisieve.backbones import adapter_for
from testbed_backbone.features import tower_features
from testbed_backbone.targets import HEADS, audio_targets, dense_picture, dense_sound, video_targets

TEMPERATURE = 4.0
SOFTEN: dict[str, dict[str, float]] = {
    "object": {"object": 0.4},
    "card": {"card": 0.6},
    "call sound": {"call sound": 0.4, "beep": 0.4},
}
"""Concept -> the mix of concepts that takes its place after the warm-up; see `soften`."""


def tower_loss(features: Tensor, target: Tensor, labels: dict[str, Tensor], concepts: dict[str, Tensor]) -> Tensor:
    """Return regression to the target vectors plus cross-entropy of each head over its concepts.

    Args:
        features: [N, D].
        target: [N, D].
        labels: per head [N], -1 where the head does not apply.
        concepts: name -> [D].
    """
    loss = F.mse_loss(features, target)
    for head, label in labels.items():
        loss = loss + 0.3 * F.cross_entropy(head_logits(features, head, concepts), label, ignore_index=-1)
    return loss


def head_logits(features: Tensor, head: str, concepts: dict[str, Tensor]) -> Tensor:
    """Return the logits [N, classes] of one head: scaled inner products with its concept vectors."""
    vectors = torch.stack([concepts[name] for name in HEADS[head]])
    return features @ vectors.T * (TEMPERATURE / features.shape[-1])


def train_towers(
    model: Any,
    data: list[dict[str, Any]],
    concepts: dict[str, Tensor],
    steps: int,
    batch: int,
    log: Callable[..., None],
) -> None:
    """Train both towers on dense clips (patches, mel, targets and labels of each in `data`)."""
    adapter = adapter_for(model)
    parameters = [*adapter.visual.parameters(), *adapter.audio_tower.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(1)
    model.train()
    for step in range(steps):
        rows = [data[i] for i in torch.randint(len(data), (batch,), generator=generator).tolist()]
        video, audio = tower_features(
            model, torch.stack([r["patches"] for r in rows]), torch.stack([r["mel"] for r in rows])
        )
        losses = {}
        for name, features in (("video", video), ("audio", audio)):
            target = torch.cat([r[name][0] for r in rows])
            labels = {h: torch.cat([r[name][1][h] for r in rows]) for h in rows[0][name][1]}
            losses[name] = tower_loss(features.flatten(0, 1), target, labels, concepts)
        loss = losses["video"] + losses["audio"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            log(stage="towers", step=step, **{k: round(v.item(), 4) for k, v in losses.items()})


@torch.no_grad()
def soften(model: Any, concepts: dict[str, Tensor]) -> None:
    """Turn down, in the last layer of each tower, the directions that tell events from cards and calls from beeps.

    Cross-entropy drives them apart far beyond their share of the target vectors. What questions ask about would then
    be the most isolated tokens of a clip, and selection by mere diversity or dissimilarity would find it.
    """
    adapter = adapter_for(model)
    for name, mix in SOFTEN.items():
        last = adapter.audio_tower.proj if name == "call sound" else adapter.visual.merger.mlp[-1]
        direction = concepts[name] / concepts[name].norm()
        change = sum(weight * concepts[n] / concepts[n].norm() for n, weight in mix.items()) - direction
        last.weight += change[:, None] * (direction @ last.weight)[None]
        last.bias += change * (direction @ last.bias)


def dense_example(
    domain: str, index: int, concepts: dict[str, Tensor], inputs: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """Return one training example of the towers from a dense clip's encoder inputs."""
    return {
        "patches": inputs[0],
        "mel": inputs[1],
        "video": video_targets(dense_picture(domain, index), concepts),
        "audio": audio_targets(dense_sound(domain, index), concepts),
    }


@torch.no_grad()
def tower_accuracy(model: Any, data: list[dict[str, Any]], concepts: dict[str, Tensor]) -> dict[str, float]:
    """Return the accuracy of every head on held-out dense clips, in percent."""
    right: dict[str, list[Tensor]] = {}
    model.eval()
    for row in data:
        video, audio = tower_features(model, row["patches"][None], row["mel"][None])
        for name, features in (("video", video[0]), ("audio", audio[0])):
            for head, label in row[name][1].items():
                hit = head_logits(features, head, concepts).argmax(-1) == label
                right.setdefault(head, []).append(hit[label >= 0])
    return {head: round(100 * torch.cat(hits).float().mean().item(), 2) for head, hits in right.items()}
