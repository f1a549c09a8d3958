"""Top-down selection inside the LLM (SEATS, section 4.2.2): windows compete for tokens, then modalities in a window.

A window is as relevant as its mean score says, each modality through a softmax over windows of its own. What a window
may keep is split over its modalities by relevance times budget; of each the best-scored tokens stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omnisieve.layout import MEDIA, Modality, TokenLayout
from omnisieve.ops.groups import rank_in_group
from omnisieve.ops.topk import settled, topk_mask
from omnisieve.ops.waterfill import level_out, round_half_even, share_out


def windows_by_time(layout: TokenLayout) -> tuple[Tensor, int]:
    """The 2-s window of every media token, [2, B, S] long, video before audio, and how many there are.

    What is not of a modality has the number of windows.
    """
    groups = max(int(layout.window.max()) + 1, 1)
    window = layout.derived(("window",), lambda: layout.window)
    return torch.stack([torch.where(layout.mask(m), window, groups) for m in MEDIA]), groups


def windows_by_run(alive: Tensor, layout: TokenLayout) -> tuple[Tensor, int]:
    """Contiguous runs of one modality in what is left, numbered in each; see `windows_by_time`.

    Args:
        alive: [B, S] bool, media tokens still there.
        layout: of the whole sequence.

    Returns:
        as `windows_by_time`; there are no more runs than in the whole sequence.
    """
    groups = max(layout.segments("run", modality).sizes.shape[1] for modality in MEDIA)
    left = alive | layout.mask(Modality.TEXT, Modality.IMAGE)
    place = torch.arange(1, alive.shape[1] + 1, device=alive.device)
    # The last token that is left before each, counted from 1; 0 where there is none.
    before = torch.nn.functional.pad(torch.where(left, place, 0).cummax(dim=1).values, (1, 0))[:, :-1]
    runs = []
    for modality in MEDIA:
        member = alive & layout.mask(modality)
        follows = torch.nn.functional.pad(member, (1, 0)).gather(1, before)
        run = (member & ~follows).cumsum(dim=1) - 1
        runs.append(torch.where(member, run, groups))
    return torch.stack(runs), groups


def select_top_down(
    scores: Tensor,
    alive: Tensor,
    layout: TokenLayout,
    kept: Tensor,
    *,
    tau: float,
    official: bool,
    normal: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Which media tokens stay, [B, S] bool.

    A sample with one window, or with one modality, has nothing to share out: the best of each modality stay.

    Args:
        scores: [B, S].
        alive: [B, S] bool, media tokens still there.
        layout: of the whole sequence.
        kept: [B, 2] long, video and audio tokens that stay.
        tau: temperature of the softmax over windows.
        official: windows are runs of what is left, the i-th of video and the i-th of audio; budgets are repaired and
            split as the published code does, which can miss the sum of `kept` by a few tokens. Otherwise windows last
            2 s, and each modality gets exactly its own.
        normal: what is taken off scores and what they are multiplied by before windows are weighed, [B, 1] each.
    """
    windows, groups = windows_by_run(alive, layout) if official else windows_by_time(layout)
    windows = torch.where(alive, windows, groups)
    sizes = _sums(torch.ones_like(scores, dtype=torch.long), windows, groups)
    total = _sums(scores.double(), windows, groups)
    # Windows whose means agree to rounding are equally relevant.
    means = settled((total / sizes.clamp(min=1)).mT, (sizes > 0).mT).mT
    if normal is not None:
        means = (means - normal[0].unsqueeze(-1)) * normal[1].unsqueeze(-1)
    relevance = _relevance(means.masked_fill(sizes == 0, 0), sizes, tau)
    counts = (_published_counts if official else _exact_counts)(relevance, sizes, kept)

    keep, alone = torch.zeros_like(alive), _nothing_to_share(sizes)
    for index, modality in enumerate(MEDIA):
        window = windows[index]
        wanted = torch.nn.functional.pad(counts[..., index], (0, 1)).gather(1, window)
        in_windows = rank_in_group(-scores, window, groups) < wanted
        overall = topk_mask(scores, alive & layout.mask(modality), kept[:, index])
        keep |= torch.where(alone, overall, in_windows)
    return keep


def _sums(values: Tensor, windows: Tensor, groups: int) -> Tensor:
    """Values [B, S] added up over the windows of each modality, [B, G, 2]."""
    zeros = torch.zeros(values.shape[0], groups + 1, dtype=values.dtype, device=values.device)
    return torch.stack([zeros.scatter_add(1, window, values)[:, :groups] for window in windows], dim=-1)


def _nothing_to_share(sizes: Tensor) -> Tensor:
    """[B, 1] bool: samples with one window or one modality."""
    video, audio = (sizes > 0).sum(dim=1, keepdim=True).unbind(dim=-1)
    return (video == 0) | (audio == 0) | ((video <= 1) & (audio <= 1))


def _relevance(means: Tensor, sizes: Tensor, tau: float) -> Tensor:
    """Softmax over windows of the mean score of each modality, [B, G, 2]; a window without it scores 0."""
    empty = (sizes.sum(dim=-1, keepdim=True) == 0).expand_as(means)
    return (means / tau).masked_fill(empty, -1e300).softmax(dim=1)


def _published_counts(relevance: Tensor, sizes: Tensor, kept: Tensor) -> Tensor:
    """Tokens per window and modality, [B, G, 2], in the published order of repairs."""
    total, most = kept.sum(dim=-1), sizes.sum(dim=-1)
    share = relevance.mean(dim=-1) * total.unsqueeze(-1)
    window = level_out(torch.minimum(round_half_even(share).clamp(min=1), most), most, total)
    demand = relevance * kept.unsqueeze(1)
    video_share = demand[..., 0] / (demand.sum(dim=-1) + 1e-12)
    has_video, has_audio = sizes.unbind(dim=-1)
    video = torch.minimum(round_half_even(window * video_share), has_video)
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
