"""Attention of a few rows, computed beside a stock layer, is what the layer itself computes."""

from __future__ import annotations

import pytest
import torch

from omnisieve.backbones import adapter_for
from omnisieve.backbones.layer_attention import attention_of_rows
from tests.models import FAMILIES, SOUNDING, tiny_inputs, tiny_thinker


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", [0, 2])
def test_it_is_the_layers_own_attention(family, number):
    model = tiny_thinker(attention="eager", family=family)
    layer, seen = adapter_for(model).layers[number], []

    def look(module, args, kwargs):
        seen.append((args[0], kwargs["position_embeddings"]))

    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        weights = model(**tiny_inputs(model, [[SOUNDING]]), output_attentions=True).attentions[number][0]
    handle.remove()
    states, rope = seen[0]
    rows = torch.tensor([[states.shape[1] - 1, 20]])
    visible = torch.arange(states.shape[1]) <= rows.unsqueeze(-1)
    with torch.no_grad():
        found = attention_of_rows(layer, states, rope, rows, visible)
    torch.testing.assert_close(found[0], weights[:, rows[0]].mean(dim=(0, 1)), rtol=0, atol=1e-6)


def test_it_draws_no_random_numbers_and_leaves_the_mode_alone():
    layer = adapter_for(tiny_thinker()).layers[0].train()
    layer.self_attn.q_proj = torch.nn.Sequential(layer.self_attn.q_proj, torch.nn.Dropout(0.5))
    states, rope = torch.randn(1, 5, 32), (torch.randn(1, 5, 8), torch.randn(1, 5, 8))
    rows, visible = torch.tensor([[4]]), torch.ones(1, 1, 5, dtype=torch.bool)
    before = torch.get_rng_state()
    first, second = (attention_of_rows(layer, states, rope, rows, visible) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in layer.modules())
