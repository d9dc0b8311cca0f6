"""Contenders of many adapters under ONNX Runtime compute what the model computes with each row's adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from benchmarks.adapters.onnx_contenders import NAMES, onnx_contenders, write_exports
from benchmarks.contenders.models import make_model
from benchmarks.contenders.settings import Settings

SETTINGS = Settings("tiny", layers=1, rank=5, batch=4)
ROWS = ["other", "default", "third", "other"]


@torch.no_grad()
@pytest.mark.usefixtures("library")
def test_they_compute_what_the_model_does(tmp_path: Path) -> None:
    model: Any = make_model(SETTINGS, "peft")
    for name, rank in (("other", 3), ("third", 4)):
        model.add_adapter(name, peft.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False))
    prompt = torch.randint(1, 128, (4, 6), generator=torch.Generator().manual_seed(0))
    token = torch.tensor([[5], [6], [7], [8]])
    both = torch.cat([prompt, token], 1)
    expected: dict[str | None, Tensor] = {}
    for name in ("default", "other", "third"):
        model.set_adapter(name)
        expected[name] = model(both).logits[:, -2:]
    with model.disable_adapter():
        expected[None] = model(both).logits[:, -2:]
    assert not torch.allclose(expected["other"], expected["third"], atol=1e-2)

    write_exports(SETTINGS, make_model(SETTINGS, "base"), model, ["default", "other", "third"], tmp_path, NAMES)
    wanted = {"base": [None] * 4, "one adapter": ["default"] * 4, "one adapter (custom ops)": ["default"] * 4}
    for name, contender in onnx_contenders(SETTINGS, model, ROWS, tmp_path, 2, NAMES).items():
        found = torch.stack([contender.prefill(prompt).clone(), contender.decode(token).clone()], 1)
        rows = wanted.get(name, ROWS)
        own = torch.stack([expected[adapter][row] for row, adapter in enumerate(rows)])
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
