"""An operator over a quantized weight, asked what it makes of one whose numbers are known.

The product with the identity is the weight. Each combination of operator, bits, block, zero points, dtype and provider
is asked once: that an operator takes a graph is no sign that it computes what the graph says.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from flora_fx.errors import ExportError, require

from ..run.session import Session
from .quantized_bits import StoredWeight, stored_weights

__all__ = ["Probe", "probe"]

_ROWS, _BLOCKS = 64, 3
"""Of the weight that is asked about; several blocks, an odd number of them: in a row, or in two if they go across."""

_LOSSY = 2e-2
"""How far a product in int8 may be off, over the largest weight."""


@dataclass(frozen=True)
class Probe:
    """A combination, and what came of it.

    Attributes:
        operator: ``"MatMulNBits"`` or ``"MatMulBnb4"``.
        bits, block, zero_points, dtype, across: see `StoredWeight`.
        level: ``accuracy_level``; 0 of an operator that has none.
        provider: that computed it.
        exact: whether the products are the weight, bit for bit, rounded to ``dtype`` once.
        error: the largest difference, over the largest weight.
    """

    operator: str
    bits: int
    block: int
    zero_points: bool
    dtype: str
    across: bool
    level: int
    provider: str
    exact: bool
    error: float

    def __str__(self) -> str:
        blocks = f"blocks of {self.block}{' across rows' if self.across else ''}"
        zeros = ", zero points" if self.zero_points else ""
        return f"{self.operator}, {self.bits} bits, {blocks}{zeros}, {self.dtype.lower()}, {self.provider}"


def probe(stored: StoredWeight, providers: Sequence[Any]) -> Probe:
    """Multiply the identity with a weight like another one.

    Args:
        stored: in a graph; its operator is no ``"MatMul"``.
        providers: usable ones; the first one with a kernel is asked.

    Raises:
        ExportError: what comes is not the weight.
    """
    columns = _BLOCKS * stored.block // (2 if stored.across else 1)
    with tempfile.TemporaryDirectory(prefix="flora_fx-probe-") as place:
        path = Path(place) / "probe.onnx"
        _write(path, stored, columns)
        [known] = stored_weights(path)
        session = Session(path, providers=providers)
        found = session.run({"x": torch.eye(columns)})["y"].t()
    expected = _rounded(torch.from_numpy(known.values), stored.dtype)
    largest = float(expected.abs().max())
    error = float((found.double() - expected.double()).abs().max()) / largest
    result = Probe(
        stored.operator,
        stored.bits,
        stored.block,
        stored.zero_points,
        stored.dtype,
        stored.across,
        stored.level,
        session.provider,
        torch.equal(found, expected),
        error,
    )
    if not error <= _allowed(result):
        raise ExportError(
            f"ONNX Runtime does not compute what a graph says: {result} is off by {error:.1e} of the largest weight, "
            "multiplied with the identity. Nothing was written; base='dequantize' does without that operator"
        )
    return result


def _allowed(result: Probe) -> float:
    """Nothing on a CPU, where weights are put into float32 first; elsewhere roundings of the dtype, in its kernels."""
    if result.level == 4:
        return _LOSSY
    if result.provider == "CPUExecutionProvider":
        return 0.0
    return 4 * {"FLOAT": 2.0**-23, "FLOAT16": 2.0**-10, "BFLOAT16": 2.0**-7}[result.dtype]


def _rounded(values: Tensor, dtype: str) -> Tensor:
    return values.to({"FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}[dtype]).float()


def _write(path: Path, stored: StoredWeight, columns: int) -> None:
    """A graph of one product, of x [columns, columns] in float32, with codes and scales drawn at random."""
    onnx = require("onnx", "onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    random = numpy.random.default_rng(0)
    dtype = getattr(kinds, stored.dtype)
    wide = stored.operator == "MatMulBnb4"  # whose scales are float32
    scales = random.uniform(0.01, 0.02, _ROWS * columns // stored.block).astype(numpy.float32)

    def given(name: str, shape: Sequence[int]) -> Any:
        return helper.make_tensor(name, kinds.UINT8, shape, random.bytes(int(numpy.prod(shape))), raw=True)

    attributes = {"K": columns, "N": _ROWS, "block_size": stored.block}
    if wide:
        attributes["quant_type"] = stored.quant_type
        parts = [
            given("codes", [_ROWS * columns // 2]),
            helper.make_tensor("scales", kinds.FLOAT, scales.shape, scales),
        ]
    else:
        attributes |= {"bits": stored.bits, "accuracy_level": stored.level}
        parts = [
            given("codes", [_ROWS, _BLOCKS, stored.block * stored.bits // 8]),
            helper.make_tensor("scales", dtype, [_ROWS, _BLOCKS], scales),
        ]
        if stored.zero_points:
            parts.append(given("zeros", [_ROWS, -(-_BLOCKS * stored.bits // 8)]))
    names = [part.name for part in parts]
    nodes = [
        helper.make_node("Cast", ["x"], ["z"], to=kinds.FLOAT if wide else dtype),
        helper.make_node(stored.operator, ["z", *names], ["w"], domain="com.microsoft", **attributes),
        helper.make_node("Cast", ["w"], ["v"], to=dtype),
        helper.make_node("Cast", ["v"], ["y"], to=kinds.FLOAT),
    ]
    x, y = (helper.make_tensor_value_info(name, kinds.FLOAT, [columns, None]) for name in "xy")
    graph = helper.make_graph(nodes, "probe", [x], [y], parts)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
