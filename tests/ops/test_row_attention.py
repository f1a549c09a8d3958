"""Attention of a few rows is that of the full matrix."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisieve.ops.row_attention import ROWS_AT_ONCE, row_attention


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    rows=st.sampled_from([0, 1, 3, ROWS_AT_ONCE + 1]),
    keys=st.integers(1, 9),
)
def test_it_is_the_mean_of_the_rows_that_see_something(seed, groups, kv_heads, rows, keys):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, groups * kv_heads, rows, 4, generator=generator)
    key = torch.randn(2, kv_heads, keys, 4, generator=generator)
    visible = torch.rand(2, rows, keys, generator=generator) < 0.4
    found = row_attention(query, key, visible, 0.5)
    for sample in range(2):
        seeing = [row for row in range(rows) if visible[sample, row].any()]
        expected = torch.zeros(keys)
        for row in seeing:
            for head in range(groups * kv_heads):
                logits = key[sample, head // groups] @ query[sample, head, row] * 0.5
                weights = logits.masked_fill(~visible[sample, row], -torch.inf).softmax(dim=0)
                expected += weights / (groups * kv_heads * len(seeing))
        torch.testing.assert_close(found[sample], expected, rtol=1e-5, atol=1e-6)
