"""Applying a plan: dropping, merging, gating, and what happens to positions, labels and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisieve.layout import Modality
from omnisieve.ops.estimators import straight_through
from omnisieve.plan import Merge, Plan
from tests.layouts import LayoutSpec, make_layout

masks = st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4)
sides = st.sampled_from(["left", "right"])


def plan_of(keep: torch.Tensor, **fields) -> Plan:
    return Plan(keep=keep, kept=keep.sum(dim=1).numpy(), **fields)


@given(masks, sides, st.sampled_from([(), (3,), (4,)]))
@settings(max_examples=100, deadline=None)
def test_kept_rows_positions_and_labels_are_indexed(rows: list[list[bool]], side: str, axes: tuple[int, ...]) -> None:
    keep = torch.tensor(rows)
    batch, length = keep.shape
    embeds = torch.arange(1.0, batch * length * 2 + 1).reshape(batch, length, 2)
    positions = torch.arange(100, 100 + batch * length).reshape(batch, length).expand(*axes, batch, length)
    labels = torch.arange(batch * length).reshape(batch, length)
    out = plan_of(keep).apply(embeds, position_ids=positions, labels=labels, padding_side=side)
    width = int(keep.sum(dim=1).max())
    assert out.embeds.shape == (batch, width, 2)
    for b in range(batch):
        filled = out.attention_mask[b]
        n = int(keep[b].sum())
        place = slice(0, n) if side == "right" else slice(width - n, width)
        assert filled[place].all()
        assert filled.sum() == n
        assert torch.equal(out.embeds[b, filled], embeds[b, keep[b]])
        assert not out.embeds[b, ~filled].any()
        assert torch.equal(out.labels[b, filled], labels[b, keep[b]])
        assert (out.labels[b, ~filled] == -100).all()
        rope = out.position_ids[1:] if axes == (4,) else out.position_ids
        kept_positions = (positions[1:] if axes == (4,) else positions)[..., b, :][..., keep[b]]
        assert torch.equal(rope[..., b, :][..., filled], kept_positions)
        if axes == (4,):
            # The row that counts the sequence has no gaps; gaps would be read as packed sequences.
            assert out.position_ids[0, b, filled].tolist() == list(range(n))


def test_a_bound_instead_of_a_count_leaves_padding() -> None:
    keep = torch.tensor([[True, False, True, False]])
    out = Plan(keep=keep, kept=np.array([3]), exact=False).apply(torch.ones(1, 4, 2))
    assert out.attention_mask.tolist() == [[True, True, False]]
    assert not out.embeds[0, 2].any()


def test_merges_use_the_values_from_before() -> None:
    x = torch.tensor([[[1.0], [10.0], [100.0]]])
    merge = Merge(
        source=torch.tensor([[1, 0, 2]]),
        target=torch.tensor([[0, 1, 1]]),
        weight=torch.tensor([[0.5, 1.0, 0.0]]),
        own=torch.tensor([[0.5, 0.0, 1.0]]),
    )
    assert merge.apply(x)[0, :, 0].tolist() == [5.5, 1.0, 100.0]
    out = plan_of(torch.tensor([[True, False, True]]), merge=merge).apply(x)
    assert out.embeds[0, :, 0].tolist() == [5.5, 100.0]


def test_merging_leaves_the_caller_s_embeddings_alone() -> None:
    x = torch.ones(1, 2, 1)
    merge = Merge(torch.tensor([[1]]), torch.tensor([[0]]), torch.tensor([[3.0]]), torch.ones(1, 2))
    plan_of(torch.tensor([[True, False]]), merge=merge).apply(x)
    assert (x == 1).all()


def gated() -> tuple[Plan, torch.Tensor, torch.Tensor]:
    """A plan in training, its scores and embeddings; two samples of unequal length."""
    layout = make_layout(LayoutSpec(windows=1), LayoutSpec(windows=2, audio=False))
    media = layout.mask(Modality.VIDEO, Modality.AUDIO)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(media.shape, generator=generator).requires_grad_()
    keep_media = media & (scores > 0.6)
    gate = torch.where(media, straight_through(keep_media, scores), 1.0)
    keep = keep_media | layout.mask(Modality.TEXT)
    plan = plan_of(keep, gate=gate)
    return plan, scores, torch.randn(*media.shape, 4, generator=generator)


def layout_of_gated():
    return make_layout(LayoutSpec(windows=1), LayoutSpec(windows=2, audio=False))


def test_hard_drop_teaches_kept_tokens_only() -> None:
    plan, scores, embeds = gated()
    media = layout_of_gated().mask(Modality.VIDEO, Modality.AUDIO)
    out = plan.apply(embeds)
    assert torch.equal(out.embeds[out.attention_mask], embeds[plan.keep])
    out.embeds.sum().backward()
    assert torch.equal(scores.grad != 0, plan.keep & media)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_candidates_stay_as_gated_keys(share: float) -> None:
    plan, _, embeds = gated()
    layout = layout_of_gated()
    masked = plan.with_candidates(layout, share, seed=1)
    dropped = layout.mask(Modality.VIDEO, Modality.AUDIO) & ~plan.keep
    assert not (masked.candidates & ~dropped).any()
    np.testing.assert_array_equal(masked.candidates.sum(dim=1), masked.candidate_counts)
    np.testing.assert_array_equal(masked.candidate_counts, np.round(dropped.sum(dim=1).numpy() * share))
    out = masked.apply(embeds)
    stay = plan.keep | masked.candidates
    # Embeddings are not gated here; the gate goes to the keys.
    assert torch.equal(out.embeds[out.attention_mask], embeds[stay])
    assert torch.equal(out.key_gate[out.attention_mask].detach(), plan.keep[stay].float())


def test_candidates_need_gates() -> None:
    with pytest.raises(ValueError, match="needs a learned compressor in training mode"):
        plan_of(torch.ones(1, 4, dtype=torch.bool)).with_candidates(layout_of_gated())


def test_identity_is_known_without_looking() -> None:
    layout = make_layout(LayoutSpec(), LayoutSpec(windows=1))
    present = torch.from_numpy(layout.modality > 0)
    assert plan_of(present).is_identity(layout)
    fewer = present.clone()
    fewer[0, 7] = False
    assert not plan_of(fewer).is_identity(layout)
    assert not plan_of(present, gate=torch.ones(present.shape)).is_identity(layout)


def test_measured_counts_by_modality() -> None:
    layout = make_layout(LayoutSpec(), LayoutSpec(audio=False))
    keep = torch.from_numpy(layout.modality == Modality.AUDIO) | layout.mask(Modality.TEXT)
    measured = plan_of(keep).measured(layout)
    assert measured["video"].tolist() == [0, 0]
    assert measured["audio"].tolist() == [30, 0]
