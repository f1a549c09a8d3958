"""FastVID as its published variants compute it, frame by frame: the scenes of the vector files are short."""

from __future__ import annotations

import torch
from torch import Tensor


def prune(
    video: Tensor,
    attention: Tensor,
    variant: str,
    ratio: float,
    scenes: int,
    still: float,
    d: float,
    p: int,
    own: float,
) -> tuple[list[int], Tensor]:
    """Kept positions in T x P tokens, and the video [T * P, D] with what was merged into them.

    Args:
        video: [T, P, D].
        attention: [T, P].
        variant: "llava" or "qwen".
        ratio, scenes, still, d, p, own: as in the settings; scenes end at the least similar frames only.
    """
    frames, patches, _ = video.shape
    mean = video.mean(dim=1)
    similarity = torch.cosine_similarity(mean[:-1], mean[1:], dim=-1).tolist()
    changes = sorted(range(frames - 1), key=lambda t: similarity[t])
    ends = [*sorted(changes[: scenes - 1]), frames - 1]
    kept: list[int] = []
    merged = video.flatten(0, 1).clone()
    begin = 0
    for end in ends:
        scene = list(range(begin, end + 1))
        salient_count, context_count = (llava_counts if variant == "llava" else qwen_counts)(
            scene, similarity, patches, ratio, still, d, p
        )
        salient, targets = set(), {}
        for t in scene:
            chosen = attention[t].topk(salient_count[t]).indices.tolist()
            salient |= {t * patches + i for i in chosen}
            rest = [i for i in range(patches) if i not in chosen]
            if context_count[t]:
                best = density(video[t, rest]).topk(context_count[t]).indices.tolist()
                targets[t] = sorted(t * patches + rest[i] for i in best)
        for own_targets in targets.values():
            excluded = salient | (set(own_targets) if variant == "qwen" else set())
            merge(video.flatten(0, 1), merged, own_targets, scene, patches, excluded, own)
        kept += sorted(salient | {i for t in targets.values() for i in t})
        begin = end + 1
    return kept, merged


def llava_counts(scene, similarity, patches, ratio, still, d, p):
    each = int(patches * ratio)
    context = int(each * d)
    anchors = scene[::-1][::p]
    return dict.fromkeys(scene, each - context), {
        t: context * len(scene) // len(anchors) if t in anchors else 0 for t in scene
    }


def qwen_counts(scene, similarity, patches, ratio, still, d, p):
    total = int(patches * ratio) * len(scene)
    context = max(int(total * d), 1)
    salient = total - context
    if len(scene) == 1:
        return {scene[0]: salient}, {scene[0]: context}
    moving = [t for t in scene if t == scene[-1] or similarity[t] < still]
    anchors = moving[::-1][::p]
    each, more = divmod(context, len(anchors))
    contexts = dict.fromkeys(scene, 0)
    contexts |= {t: min(each + (i < more), patches // 2) for i, t in enumerate(anchors)}
    each, more = divmod(salient, len(moving))
    salients = dict.fromkeys(scene, 0)
    salients |= {t: min(each + (i < more), patches - contexts[t]) for i, t in enumerate(moving)}
    return salients, contexts


def density(x: Tensor) -> Tensor:
    distance = (x[:, None] - x[None]).norm(dim=-1) / x.shape[-1] ** 0.5
    rho = torch.exp(-distance.topk(4, largest=False).values.square().mean(dim=-1))
    separation = [
        min((float(distance[i, j]) for j in range(len(x)) if rho[j] > rho[i]), default=float(distance.max()))
        for i in range(len(x))
    ]
    return torch.tensor(separation) * rho


def merge(x: Tensor, merged: Tensor, targets: list[int], scene, patches: int, excluded: set[int], own: float) -> None:
    members: dict[int, list[int]] = {target: [] for target in targets}
    for i in range(scene[0] * patches, (scene[-1] + 1) * patches):
        if i not in excluded:
            nearest = int(torch.cosine_similarity(x[i : i + 1], x[targets], dim=-1).argmax())
            members[targets[nearest]].append(i)
    for target, joined in members.items():
        if joined:
            weight = max(own, 1 / (len(joined) + 1))
            merged[target] = weight * x[target] + (1 - weight) * x[joined].mean(dim=0)
