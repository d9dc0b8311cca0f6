"""A quantized weight as numbers: codes, scales and zero points, whatever library or file they came from.

    affine      W[n, order[k]] = (code[n, k] - zero[n, k // block]) · scale[n, k // block]
    nf4, fp4    W.flatten()[i] = codebook[code[i]] · scale[i // block]

Nothing is computed again: the codes are the source's own, and `QuantizedWeight.dequantize` gives, bit for bit, what the
source's own dequantization gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["CODEBOOKS", "Kind", "QuantizedWeight", "pack_codes", "unpack_codes", "values_of"]

Kind = Literal["affine", "nf4", "fp4"]

CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
        *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        *(-0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
        *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
    ),
}
"""What each code of bitsandbytes' 4-bit types stands for, in float32 (QLoRA, arXiv 2305.14314, appendix E)."""

_BITS = (2, 4, 8)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The weight of a linear layer, [out, in] = [N, K].

    Attributes:
        kind: ``"affine"``, or a codebook of bitsandbytes.
        bits: of a code: 2, 4 or 8; 4 for a codebook.
        block: how many codes share a scale: neighbours along K (affine), or in the flattened weight (codebooks), whose
            size is a multiple of it; a block may go across rows there.
        codes: uint8. Affine: [N, blocks · bytes of a block], each block in whole bytes, the first code in the lowest
            bits, the last block filled up with zeros. Codebooks: [N·K / 2], the first code in the highest bits.
        scales: affine: [N, blocks]; codebooks: float32 [N·K / block].
        zeros: the codes that mean 0, uint8 [N, blocks]; None where all are ``2 ** (bits - 1)``, and for codebooks.
        order: int64 [K], which column of W each column of the codes is; None where they are in order.
        shape: (N, K).
        dtype: what the source dequantizes to.
        source: where it came from, for readers: "GPTQ, 4 bits, groups of 128, act-order".

    Raises:
        ValueError: the parts do not fit each other.

    >>> weight = QuantizedWeight("affine", 4, 2, torch.tensor([[0x98, 0x07]], dtype=torch.uint8),
    ...     torch.tensor([[0.5, 2.0]]), None, None, (1, 3), torch.float32, "by hand")
    >>> weight.dequantize()
    tensor([[ 0.0000,  0.5000, -2.0000]])
    """

    kind: Kind
    bits: int
    block: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    shape: tuple[int, int]
    dtype: torch.dtype
    source: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(map(repr, get_args(Kind)))}")
        if self.bits not in (_BITS if self.kind == "affine" else (4,)):
            raise ValueError(f"{self.bits} bits of kind {self.kind!r}")
        for name, (dtypes, shape) in self._expected().items():
            part = getattr(self, name)
            if part is not None and (part.dtype not in dtypes or tuple(part.shape) != shape):
                raise ValueError(
                    f"{name} of {self.source} is {list(part.shape)} of {part.dtype}; it must be {list(shape)} of "
                    f"{' or '.join(map(str, dtypes))}"
                )
        whole = self.shape[0] * self.shape[1] % self.block == 0
        if self.kind != "affine" and (self.zeros is not None or self.order is not None or not whole):
            raise ValueError(f"{self.source}: a codebook has no zero points, no order, and whole blocks")

    def _expected(self) -> dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]:
        """The dtypes and the shape that each part must have."""
        n, k = self.shape
        if self.kind != "affine":
            return {
                "codes": ((torch.uint8,), (n * k // 2,)),
                "scales": ((torch.float32,), (n * k // self.block,)),
            }
        blocks = -(-k // self.block)
        return {
            "codes": ((torch.uint8,), (n, blocks * _bytes(self.block, self.bits))),
            "scales": (_FLOATS, (n, blocks)),
            "zeros": ((torch.uint8,), (n, blocks)),
            "order": ((torch.int64,), (k,)),
        }

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as floating-point numbers, columns in their own order.

        Args:
            dtype: of the result; None for what the source dequantizes to. It is computed in float32 and rounded once.

        Returns:
            [N, K].
        """
        found = values_of(self.codes, self.scales, self.zeros, self.order, self.kind, self.bits, self.block, self.shape)
        return found.to(dtype or self.dtype)

    def unpacked(self) -> Tensor:
        """The codes, one an element: uint8 [N, K], columns in the order of the codes."""
        return unpack_codes(self.codes, self.kind, self.bits, self.block, self.shape)

    def difference(self, other: QuantizedWeight) -> str:
        """Why another weight cannot stand under this one; ``""`` where it can.

        >>> weight = QuantizedWeight("affine", 8, 3, torch.ones(2, 3, dtype=torch.uint8), torch.ones(2, 1), None,
        ...     None, (2, 3), torch.float32, "by hand")
        >>> weight.difference(replace(weight, scales=weight.scales.half()))
        'their scales are float32 and float16'
        """
        for what, own, its in (
            ("kinds", self.kind, other.kind),
            ("bits", self.bits, other.bits),
            ("groups", self.block, other.block),
            ("input features", self.shape[1], other.shape[1]),
            ("scales", _name(self.scales.dtype), _name(other.scales.dtype)),
            ("source's dtypes", _name(self.dtype), _name(other.dtype)),
        ):
            if own != its:
                return f"their {what} are {own} and {its}"
        orders = (self.order, other.order)
        same = orders[0] is orders[1] or (None not in orders and torch.equal(*orders))  # type: ignore[arg-type]
        return "" if same else "their columns are in another order (act-order)"

    @staticmethod
    def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Several weights that read one value as rows of one.

        Raises:
            ValueError: two of them differ in kind, bits, groups, order or dtype.

        >>> weight = QuantizedWeight("affine", 8, 3, torch.ones(2, 3, dtype=torch.uint8), torch.ones(2, 1), None,
        ...     None, (2, 3), torch.float32, "by hand")
        >>> QuantizedWeight.stack([weight, weight, weight]).shape
        (6, 3)
        """
        first = weights[0]
        for other in weights[1:]:
            if difference := first.difference(other):
                raise ValueError(f"weights cannot be stacked: {difference}")
        zeros = None
        if any(weight.zeros is not None for weight in weights):
            zeros = torch.cat([weight.explicit_zeros() for weight in weights])
        return replace(
            first,
            codes=torch.cat([weight.codes for weight in weights]),
            scales=torch.cat([weight.scales for weight in weights]),
            zeros=zeros,
            shape=(sum(weight.shape[0] for weight in weights), first.shape[1]),
            source="; ".join(dict.fromkeys(weight.source for weight in weights)),
        )

    def explicit_zeros(self) -> Tensor:
        """The zero points of an affine weight, uint8 [N, blocks], also where they go without saying."""
        if self.zeros is not None:
            return self.zeros
        return torch.full(self.scales.shape, 2 ** (self.bits - 1), dtype=torch.uint8, device=self.codes.device)


def values_of(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    kind: str,
    bits: int,
    block: int,
    shape: tuple[int, int],
) -> Tensor:
    """The numbers that codes stand for; arguments as `QuantizedWeight` has them.

    Args:
        scales: in any floating-point dtype that holds the source's exactly.

    Returns:
        float32 [N, K].
    """
    n, k = shape
    scales = scales.to(torch.float32)
    if kind != "affine":
        table = torch.tensor(CODEBOOKS[kind], dtype=torch.float32, device=codes.device)
        byte = torch.arange(256, device=codes.device)
        pairs = table[torch.stack([byte >> 4, byte & 15], -1)]  # of each byte
        return pairs[codes.int()].reshape(-1, block).mul_(scales[:, None]).reshape(n, k)
    values = _by_block(codes, bits, block, shape).to(torch.float32)
    values.sub_(2.0 ** (bits - 1) if zeros is None else zeros.to(torch.float32)[:, :, None]).mul_(scales[:, :, None])
    values = values.flatten(1)[:, :k]
    return values.contiguous() if order is None else torch.empty_like(values).index_copy_(1, order, values)


def pack_codes(codes: Tensor, bits: int, block: int) -> Tensor:
    """Codes of an affine weight as `QuantizedWeight` holds them.

    Args:
        codes: [N, K], integers from 0 to ``2 ** bits - 1``.

    Returns:
        uint8 [N, blocks · bytes of a block].

    >>> pack_codes(torch.tensor([[1, 2, 3]]), bits=4, block=2)
    tensor([[33,  3]], dtype=torch.uint8)
    """
    n, k = codes.shape
    blocks, per_byte, width = -(-k // block), 8 // bits, _bytes(block, bits)
    filled = torch.zeros(n, blocks, width * per_byte, dtype=torch.uint8, device=codes.device)
    padded = torch.zeros(n, blocks * block, dtype=torch.uint8, device=codes.device)
    padded[:, :k] = codes.to(torch.uint8)
    filled[:, :, :block] = padded.reshape(n, blocks, block)
    parts = filled.reshape(n, blocks * width, per_byte)
    packed = torch.zeros(n, blocks * width, dtype=torch.uint8, device=codes.device)
    for position in range(per_byte):
        packed |= parts[..., position] << (bits * position)
    return packed


def unpack_codes(codes: Tensor, kind: str, bits: int, block: int, shape: tuple[int, int]) -> Tensor:
    """The codes of a weight, one an element.

    Args:
        codes: as `QuantizedWeight` holds them.

    Returns:
        uint8 [N, K].

    >>> unpack_codes(torch.tensor([[33, 3]], dtype=torch.uint8), "affine", bits=4, block=2, shape=(1, 3))
    tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    n, k = shape
    if kind != "affine":
        return torch.stack([codes >> 4, codes & 15], -1).reshape(n, k)
    return _by_block(codes, bits, block, shape).flatten(1)[:, :k]


def _by_block(codes: Tensor, bits: int, block: int, shape: tuple[int, int]) -> Tensor:
    """The codes of an affine weight, [N, blocks, block], with what fills up the last block."""
    n, k = shape
    parts = torch.stack([(codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)
    return parts.reshape(n, -(-k // block), -1)[:, :, :block]


def _bytes(block: int, bits: int) -> int:
    return -(-block * bits // 8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
