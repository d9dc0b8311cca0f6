"""Weights put into few bits: no number is farther from its own than half a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flora_fx.quantized import QuantizedLinear
from flora_fx.quantized.nearest import nearest, quantize_linears
from flora_fx.quantized.weight import CODEBOOKS


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_affine_numbers_are_the_nearest(bits: int) -> None:
    weight = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))
    held = nearest(weight, bits=bits, block=32)
    steps = held.scales.repeat_interleave(32, 1)[:, :70]
    away = (held.dequantize() - weight).abs() / steps
    assert float(away.max()) <= 1, "zero points are whole: at an end of a block half a step more"
    assert float(away.mean()) < 0.3
    assert int(held.unpacked().min()) == 0
    assert int(held.unpacked().max()) == 2**bits - 1


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codebook_numbers_are_the_nearest(kind: str) -> None:
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    held = nearest(weight, kind, block=32)  # type: ignore[arg-type]
    largest = weight.reshape(-1, 32).abs().amax(1, keepdim=True)
    choices = torch.tensor(CODEBOOKS[kind])[None, :] * largest
    best = (weight.reshape(-1, 32, 1) - choices[:, None, :]).abs().amin(-1)
    away = (held.dequantize().reshape(-1, 32) - weight.reshape(-1, 32)).abs()
    torch.testing.assert_close(away, best)


def test_a_block_of_zeros_is_one() -> None:
    for kind in ("affine", "nf4"):
        assert not nearest(torch.zeros(2, 32), kind).dequantize().any()  # type: ignore[arg-type]


def test_linear_layers_but_the_head() -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=31
    )
    model = quantize_linears(transformers.LlamaForCausalLM(config))
    assert sum(isinstance(part, QuantizedLinear) for part in model.modules()) == 7
    assert type(model.lm_head) is nn.Linear
