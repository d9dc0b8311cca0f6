"""The numbers that codes stand for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flora_fx.quantized import QuantizedWeight
from flora_fx.quantized.weight import CODEBOOKS, pack_codes, unpack_codes

from .weights import affine, codebook


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("k", "block"), [(48, 16), (40, 16), (37, 37), (7, 3)])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_an_affine_weight_is_code_less_zero_times_scale(
    bits: int, k: int, block: int, zeros: bool, ordered: bool
) -> None:
    weight, expected = affine(6, k, bits=bits, block=block, zeros=zeros, ordered=ordered)
    assert torch.equal(weight.dequantize(torch.float32), expected)
    assert torch.equal(weight.dequantize(), expected.half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_dequantizes_to_its_sources_dtype(dtype: torch.dtype) -> None:
    weight, _ = affine(5, 32, dtype=dtype)
    assert weight.dequantize().dtype == dtype


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_codebooks_first_code_is_in_the_highest_bits(kind: str) -> None:
    weight = codebook(3, 32, kind=kind)
    found = weight.dequantize().flatten()
    for index in range(3 * 32):
        byte = int(weight.codes[index // 2])
        code = byte >> 4 if index % 2 == 0 else byte & 15
        wanted = torch.tensor(CODEBOOKS[kind][code]) * weight.scales[index // 16]
        assert found[index] == wanted


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_come_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 21), dtype=torch.uint8)
    packed = pack_codes(codes, bits, 6)
    assert torch.equal(unpack_codes(packed, "affine", bits, 6, (5, 21)), codes)
    assert packed.shape == (5, 4 * -(-6 * bits // 8))


def test_weights_stand_under_each_other() -> None:
    first, q = affine(6, 32, zeros=False, seed=1)
    second, k = affine(4, 32, zeros=True, seed=2)
    found = QuantizedWeight.stack([first, second])
    assert found.shape == (10, 32)
    assert torch.equal(found.dequantize(torch.float32), torch.cat([q, k]))
    blocks = [codebook(4, 32, seed=1), codebook(6, 32, seed=2)]
    assert torch.equal(QuantizedWeight.stack(blocks).dequantize(), torch.cat([one.dequantize() for one in blocks]))


def test_those_of_one_order_do_and_of_another_do_not() -> None:
    order = torch.randperm(32)
    first, q = affine(6, 32, order=order, seed=1)
    second, k = affine(4, 32, order=order.clone(), seed=2)
    assert torch.equal(QuantizedWeight.stack([first, second]).dequantize(torch.float32), torch.cat([q, k]))
    other, _ = affine(4, 32, ordered=True, seed=3)
    for odd in (other, affine(4, 32)[0]):
        with pytest.raises(ValueError, match="another order"):
            QuantizedWeight.stack([first, odd])


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (codebook(4, 32), "kinds"),
        (affine(4, 32, bits=8)[0], "bits"),
        (affine(4, 32, block=8)[0], "groups"),
        (affine(4, 48)[0], "input features"),
        (affine(4, 32, dtype=torch.float32)[0], "scales"),
    ],
)
def test_weights_that_differ_are_told(other: QuantizedWeight, told: str) -> None:
    weight, _ = affine(4, 32)
    assert told in weight.difference(other)
    with pytest.raises(ValueError, match=told):
        QuantizedWeight.stack([weight, other])


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": "int4"},
        {"bits": 3},
        {"shape": (4, 48)},
        {"scales": torch.ones(4, 2, dtype=torch.float64)},
        {"zeros": torch.zeros(4, 2, dtype=torch.int8)},
        {"order": torch.arange(31)},
    ],
)
def test_parts_that_do_not_fit_are_refused(changed: dict[str, Any]) -> None:
    weight, _ = affine(4, 32)
    with pytest.raises(ValueError, match=r"must be|bits of kind"):
        replace(weight, **changed)


def test_a_codebook_has_whole_blocks_also_across_rows() -> None:
    weight = codebook(2, 24, block=16)
    table = torch.tensor(CODEBOOKS["nf4"])
    assert weight.dequantize()[1, 7] == table[int(weight.codes[15] & 15)] * weight.scales[1]
    assert weight.dequantize()[1, 8] == table[int(weight.codes[16] >> 4)] * weight.scales[2]
    with pytest.raises(ValueError, match=r"must be|whole blocks"):
        codebook(3, 24, block=16)
