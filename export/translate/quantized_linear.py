"""A linear layer over a quantized weight, in the form that was chosen for it.

    keep         y = MatMulNBits(x, codes, scales, zero points)             affine
                 y = MatMulBnb4(x, codes, scales)                           codebooks, in float32
    dequantize   W = (codes >> shifts & mask, or what the codebook has there, minus zero points) · scales
                 y = x Wᵀ                                                   which ONNX Runtime folds as it loads

ONNX Runtime's own ``g_idx`` is never written: beside zero points its CPU kernel (1.31) computes something else, without
a word. Columns in another order are put in order in x, or in W where that is folded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor
from torch.fx import Node

from flora_fx.quantized.weight import CODEBOOKS, Kind, pack_codes

from ..trace.quantized_base import QuantizedBase
from .nodes import Weight
from .operators import Writing, value_of

__all__ = ["write_quantized_linear"]

_QUANT_TYPES: dict[Kind, int] = {"fp4": 0, "nf4": 1}


def write_quantized_linear(w: Writing, node: Node, weight: Callable[[Any], Weight], base: QuantizedBase) -> ir.Value:
    """Write a call of ``flora_fx::quantized_linear``.

    Args:
        w: what operators are written with.
        node: of the fused program.
        weight: gives the weight that a placeholder is; raises `Unknown` for anything else.
        base: the forms that were chosen.
    """
    return _Layer(w, node, weight, base).written()


class _Layer:
    kind: Kind
    bits: int
    block: int
    rows: int

    def __init__(self, w: Writing, node: Node, weight: Callable[[Any], Weight], base: QuantizedBase) -> None:
        self.w, self.base = w, base
        target: Any = node.target
        given: list[Any] = [
            node.args[index] if index < len(node.args) else node.kwargs[parameter.name]
            for index, parameter in enumerate(target._schema.arguments)
        ]
        self.x, codes, scales, zeros, order, self.bias, self.kind, self.bits, self.block, self.rows = given
        self.codes, self.scales = weight(codes), weight(scales)
        self.zeros = None if zeros is None else weight(zeros)
        self.order = None if order is None else weight(order)
        self.like = value_of(node)
        self.columns = int(value_of(self.x).shape[-1])
        self.dtype = value_of(self.x).dtype

    def written(self) -> ir.Value:
        if self.base.forms[self.kind] == "dequantize":
            return self._with_bias(self._add("MatMul", [self.w.value(self.x), self._dequantized()], self.like))
        if self.kind == "affine":
            return self._in_bits()
        return self._with_bias(self._of_bitsandbytes())

    # --- kept

    def _in_bits(self) -> ir.Value:
        x = self.w.value(self.x)
        if self.order is not None:
            x = self._add("Gather", [x, self.w.nodes.weight(self.order)], value_of(self.x), axis=-1)
        blocks, bits = self.scales.like.shape[1], self.bits
        codes = _made(self.codes, "", lambda held: held.reshape(self.rows, blocks, -1))
        scales = _made(self.scales, "", lambda held: held.to(self.dtype))
        zeros = None if self.zeros is None else _made(self.zeros, "", lambda held: pack_codes(held, bits, blocks))
        given = [x, *(None if part is None else self.w.nodes.weight(part) for part in (codes, scales, zeros))]
        if self.bias is not None:
            given += [*[None] * (5 - len(given)), self._bias()]
        return self._add(
            "MatMulNBits",
            given,
            self.like,
            domain="com.microsoft",
            K=self.columns,
            N=self.rows,
            bits=bits,
            block_size=self.block,
            accuracy_level=self.base.accuracy_level,
        )

    def _of_bitsandbytes(self) -> ir.Value:
        """In float32, whatever the model's dtype: in another one the kernel rounds the weight three times."""
        codes, scales = (self.w.nodes.weight(part) for part in (self.codes, self.scales))
        wide = self.like.to(torch.float32)
        product = self._add(
            "MatMulBnb4",
            [self._cast(self.w.value(self.x), value_of(self.x), torch.float32), codes, scales],
            wide,
            domain="com.microsoft",
            K=self.columns,
            N=self.rows,
            block_size=self.block,
            quant_type=_QUANT_TYPES[self.kind],
        )
        return self._cast(product, wide, self.dtype)

    # --- dequantized

    def _dequantized(self) -> ir.Value:
        """The weight [columns, rows]."""
        nodes, constant = self.w.nodes, self.w.nodes.constant
        codes = self._codes()
        wide = _like(self.scales.like.numel(), self.block, dtype=torch.float32)
        if self.kind == "affine":
            values = self._cast(codes, wide.to(torch.uint8), torch.float32)
            zeros = constant(float(2 ** (self.bits - 1)), torch.float32)
            if self.zeros is not None:
                held = nodes.weight(_made(self.zeros, "", lambda held: held.reshape(-1, 1)))
                zeros = self._cast(held, _like(*wide[:, :1].shape, dtype=torch.uint8), torch.float32)
            values = self._add("Sub", [values, zeros], wide)
        else:
            book = constant(CODEBOOKS[self.kind], torch.float32)
            indices = self._cast(codes, wide.to(torch.uint8), torch.int32)
            values = self._add("Gather", [book, indices], wide, axis=0)
        scales = nodes.weight(_made(self.scales, "", lambda held: held.reshape(-1, 1)))
        scales = self._cast(scales, self.scales.like.reshape(-1, 1), torch.float32)
        values = self._add("Mul", [values, scales], wide)
        padded = wide.numel() // self.rows
        values = self._reshaped(values, _like(self.rows, padded, dtype=torch.float32))
        whole = _like(self.rows, self.columns, dtype=torch.float32)
        if padded != self.columns:
            numbers = [constant([number], torch.int64) for number in (0, self.columns, 1)]
            values = self._add("Slice", [values, *numbers], whole)
        if self.order is not None:
            back = nodes.weight(_made(self.order, ".inverse", torch.argsort))
            values = self._add("Gather", [values, back], whole, axis=1)
        values = self._cast(values, whole, self.dtype)
        return self._add("Transpose", [values], whole.t().to(self.dtype), perm=[1, 0])

    def _codes(self) -> ir.Value:
        """One code an element: uint8 [blocks of all rows, block]."""
        nodes, constant = self.w.nodes, self.w.nodes.constant
        codes = nodes.weight(self.codes)
        count, block = self.scales.like.numel(), self.block
        if self.bits < 8:
            shifts = [*range(0, 8, self.bits)] if self.kind == "affine" else [4, 0]
            apart = _like(self.codes.like.numel(), len(shifts), dtype=torch.uint8)
            codes = self._reshaped(codes, apart[:, :1])
            codes = self._add("BitShift", [codes, constant(shifts, torch.uint8)], apart, direction="RIGHT")
            codes = self._add("BitwiseAnd", [codes, constant(2**self.bits - 1, torch.uint8)], apart)
        held = self.codes.like.numel() * 8 // self.bits // count
        codes = self._reshaped(codes, _like(count, held, dtype=torch.uint8))
        if held != block:  # a block ends in the middle of a byte
            numbers = [constant([number], torch.int64) for number in (0, block, 1)]
            codes = self._add("Slice", [codes, *numbers], _like(count, block, dtype=torch.uint8))
        return codes

    # --- in few words

    def _add(
        self, op: str, given: list[ir.Value | None], like: Tensor, *, domain: str = "", **attributes: Any
    ) -> ir.Value:
        return self.w.nodes.add(op, given, [like], domain=domain, **attributes)[0]

    def _cast(self, value: ir.Value, found: Tensor, dtype: torch.dtype) -> ir.Value:
        if found.dtype == dtype:
            return value
        return self._add("Cast", [value], found.to(dtype), to=int(from_torch_dtype(dtype)))

    def _reshaped(self, value: ir.Value, like: Tensor) -> ir.Value:
        shape = self.w.nodes.constant([*like.shape], torch.int64)
        return self._add("Reshape", [value, shape], like, allowzero=1)

    def _bias(self) -> ir.Value:
        return self._cast(self.w.value(self.bias), value_of(self.bias), self.dtype)

    def _with_bias(self, product: ir.Value) -> ir.Value:
        return product if self.bias is None else self._add("Add", [product, self._bias()], self.like)


def _like(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _made(weight: Weight, suffix: str, change: Callable[[Tensor], Tensor]) -> Weight:
    """A weight that is another one, changed when it is written."""

    def make() -> Tensor:
        return change(weight.like.detach() if weight.make is None else weight.make()).contiguous()

    return Weight(weight.name + suffix, change(torch.empty_like(weight.like, device="meta")), make)
