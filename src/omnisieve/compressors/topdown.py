"""Top-down selection inside the LLM (SEATS, section 4.2.2): windows compete for tokens, then modalities in a window.

A window is as relevant as its mean score says, each modality through a softmax over windows of its own. What a window
may keep is split over its modalities by relevance times budget; of each the best-scored tokens stay.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from omnisieve.layout import MEDIA, Segments, TokenLayout
from omnisieve.ops.topk import topk_mask
from omnisieve.ops.waterfill import level_out, share_out


def select_top_down(
    scores: Tensor,
    alive: Tensor,
    layout: TokenLayout,
    windows: tuple[Segments, Segments],
    kept: Tensor,
    *,
    tau: float,
    official: bool,
) -> Tensor:
    """Which media tokens stay, [B, S] bool.

    A sample with one window, or with one modality, has nothing to share out: the best of each modality stay.

    Args:
        scores: [B, S].
        alive: [B, S] bool, media tokens still there.
        layout: of the whole sequence.
        windows: segments of video and of audio; segment g of both is one window.
        kept: [B, 2] long, video and audio tokens that stay.
        tau: temperature of the softmax over windows.
        official: repair and split budgets as the published code does, which can miss the sum of `kept` by a few
            tokens. Otherwise each modality gets exactly its own.
    """
    groups = max(segments.sizes.shape[1] for segments in windows)
    present = [segments.gather(alive) & segments.valid for segments in windows]
    sizes = torch.stack([pad(p.sum(dim=-1), (0, groups - p.shape[1])) for p in present], dim=-1)
    total = torch.stack(
        [
            pad((segments.gather(scores).double() * p).sum(dim=-1), (0, groups - p.shape[1]))
            for segments, p in zip(windows, present, strict=True)
        ],
        dim=-1,
    )
    relevance = _relevance(total / sizes.clamp(min=1), sizes, tau)
    counts = (_published_counts if official else _exact_counts)(relevance, sizes, kept)

    keep = torch.zeros_like(alive)
    for index, (modality, segments, p) in enumerate(zip(MEDIA, windows, present, strict=True)):
        wanted = counts[:, : segments.sizes.shape[1], index]
        in_windows = segments.scatter(topk_mask(segments.gather(scores), p, wanted), False)
        overall = topk_mask(scores, alive & layout.mask(modality), kept[:, index])
        keep |= torch.where(_nothing_to_share(windows, alive.device), overall, in_windows)
    return keep


def _nothing_to_share(windows: tuple[Segments, Segments], device: torch.device) -> Tensor:
    """[B, 1] bool: samples with one window or one modality, known from the layout."""
    video, audio = ((segments.sizes > 0).sum(axis=1) for segments in windows)
    alone = (video == 0) | (audio == 0) | ((video <= 1) & (audio <= 1))
    return torch.from_numpy(alone[:, None]).to(device, non_blocking=True)


def _relevance(means: Tensor, sizes: Tensor, tau: float) -> Tensor:
    """Softmax over windows of the mean score of each modality, [B, G, 2]; a window without it scores 0."""
    empty = (sizes.sum(dim=-1, keepdim=True) == 0).expand_as(means)
    return (means / tau).masked_fill(empty, -1e300).softmax(dim=1)


def _published_counts(relevance: Tensor, sizes: Tensor, kept: Tensor) -> Tensor:
    """Tokens per window and modality, [B, G, 2], in the published order of repairs."""
    total, most = kept.sum(dim=-1), sizes.sum(dim=-1)
    share = relevance.mean(dim=-1) * total.unsqueeze(-1)
    window = level_out(torch.minimum(share.round().long().clamp(min=1), most), most, total)
    demand = relevance * kept.unsqueeze(1)
    video_share = demand[..., 0] / (demand.sum(dim=-1) + 1e-12)
    has_video, has_audio = sizes.unbind(dim=-1)
    video = torch.minimum((window * video_share).round().long(), has_video)
    audio = torch.minimum(window - video, has_audio)
    video = torch.minimum(window - audio, has_video)
    # At least one token of each modality, at the cost of the other where that has more.
    no_video = (video == 0) & (has_video > 0)
    video, audio = video + no_video.long(), audio - (no_video & (audio > 1)).long()
    no_audio = (audio == 0) & (has_audio > 0)
    video, audio = video - (no_audio & (video > 1)).long(), audio + no_audio.long()
    return torch.stack([video, audio], dim=-1)


def _exact_counts(relevance: Tensor, sizes: Tensor, kept: Tensor) -> Tensor:
    """Tokens per window and modality, [B, G, 2], summing to `kept` over windows; one of each where that is possible."""
    demand = relevance * kept.unsqueeze(1) * (sizes > 0)
    wanted = relevance.mean(dim=-1, keepdim=True) * demand / demand.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    counts = []
    for shares, most, total in zip(wanted.unbind(-1), sizes.unbind(-1), kept.unbind(-1), strict=True):
        least = most.clamp(max=1) * (total >= (most > 0).sum(dim=-1)).unsqueeze(-1)
        counts.append(share_out(shares, least, most, torch.minimum(total, most.sum(dim=-1))))
    return torch.stack(counts, dim=-1)
