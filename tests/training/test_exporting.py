"""What a run exports of its compressor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from omnisieve.artifact import load_compressor
from omnisieve.compressors.omnisift import OmniSift
from omnisieve.training.exporting import export
from tests.training.runs import Alone, make_config, make_module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_are_exported_beside_float32_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    stock = OmniSift.__init__

    def with_buffers(self: OmniSift, *args: Any, **fields: Any) -> None:
        stock(self, *args, **fields)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.long))

    monkeypatch.setattr(OmniSift, "__init__", with_buffers)
    config = make_config(tmp_path / "run")
    _, module = make_module(config, Alone())  # type: ignore[arg-type]
    module.compressor.to(dtype)
    module.compressor.mean += 0.5
    module.compressor.seen += 2**24 + 1
    export(module, tmp_path / "last", config, {}, Alone())  # type: ignore[arg-type]
    found = load_compressor(tmp_path / "last").state_dict()
    assert found.keys() == module.compressor.state_dict().keys()
    for name, value in module.compressor.state_dict().items():
        expected = value.float() if value.is_floating_point() else value
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
