"""What a GPU would launch, counted in the code that Inductor writes for one: more adapters launch nothing more."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import flora_fx
from benchmarks.kernels.launches import cuda_launches
from tests.variants.models import WIDTH, Linears


def launches(ranks: list[int], layers: int) -> int:
    """Of q, k, v and o with adapters of these ranks, as a GPU runs them: eight rows of one token."""
    with torch.device("meta"):
        model: Any = Linears(layers)
        for index, rank in enumerate(ranks):
            config = peft.LoraConfig(r=rank, lora_alpha=3 * rank + index, target_modules=["q", "k", "v", "o"])
            if index:
                model.add_adapter(f"of {index}", config)
            else:
                model = peft.get_peft_model(model, config, adapter_name="of 0")
        model.eval().requires_grad_(False)
        mixed = flora_fx.MixedAdapters(model, [f"of {index}" for index in range(len(ranks))])
        x, ids = torch.randn(8, 1, WIDTH), torch.zeros(8, dtype=torch.int64)
    compiled = torch.compile(mixed, backend="flora", options={"flora.accumulate": "unrolled"}, fullgraph=True)
    with torch.no_grad():
        return sum(cuda_launches(lambda: compiled(x, adapter_ids=ids)).values())


def layer(ranks: list[int]) -> int:
    """What one more layer launches: what is computed of the ids alone is computed once."""
    return launches(ranks, 2) - launches(ranks, 1)


def test_eight_adapters_launch_what_one_does() -> None:
    pytest.importorskip("triton")
    assert layer([4, 16, 1, 8, 16, 16, 2, 3]) <= layer([16])
