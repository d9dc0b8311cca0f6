"""Quantized weights read back from a written graph, by other code than wrote them.

Of ``MatMulNBits`` and ``MatMulBnb4`` the bytes of the initializers are taken apart bit by bit in numpy, as ONNX
Runtime's documentation of the operators has it. A weight that the graph dequantizes itself is what ONNX Runtime makes
of those nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from flora_fx.errors import ExportError, require

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["StoredWeight", "stored_weights"]

_Array = numpy.ndarray[Any, Any]

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_HALF = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
_BOOKS = {0: (*_FP4_HALF, *(-value for value in _FP4_HALF)), 1: _NF4}
"""By ``quant_type``; the values that the codes 0 to 15 stand for."""


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight of a graph.

    Attributes:
        name: of the initializer that holds its codes.
        operator: that reads it; ``"MatMul"`` where the graph dequantizes it.
        bits, block: as the operator has them; 0 of ``"MatMul"``.
        zero_points: whether it has any that are not the operator's own.
        dtype: that it is multiplied in, as ONNX names it.
        level: ``accuracy_level``; 0 where the operator has none.
        quant_type: of ``"MatMulBnb4"``, as it has it; 0 of others.
        across: whether blocks of ``"MatMulBnb4"`` go across rows, whose columns they do not divide.
        values: what it stands for [rows, columns], in float32; of ``"MatMul"`` in ``dtype``.
    """

    name: str
    operator: str
    bits: int
    block: int
    zero_points: bool
    dtype: str
    level: int
    quant_type: int
    across: bool
    values: _Array


def stored_weights(graph: Path) -> Iterator[StoredWeight]:
    """The quantized weights of a graph in a file, one after the other: each is read as it is asked for.

    Args:
        graph: the ``.onnx`` file.

    Raises:
        ExportError: an operator has its columns in another order (``g_idx``), which is never written.
    """
    ir = require("onnx_ir", "onnx")
    for node in ir.load(graph).graph:
        if (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits"):
            yield _of_bits(node)
        elif (node.domain, node.op_type) == ("com.microsoft", "MatMulBnb4"):
            yield _of_bitsandbytes(node)
        elif node.op_type == "MatMul" and (found := _dequantized(node)) is not None:
            yield found


def _of_bits(node: onnx_ir.Node) -> StoredWeight:
    rows, columns, bits, block = (node.attributes[name].as_int() for name in ("N", "K", "bits", "block_size"))
    codes, scales = (_initializer(node, index) for index in (1, 2))
    blocks = -(-columns // block)
    given = len(node.inputs) > 3 and node.inputs[3] is not None
    middle = numpy.full((rows, blocks), 2 ** (bits - 1))
    zeros = _numbers(_initializer(node, 3), bits).reshape(rows, -1)[:, :blocks] if given else middle
    numbers = _numbers(codes, bits).reshape(rows, blocks, block)
    steps = (numbers - zeros.reshape(rows, blocks, 1)).astype(numpy.float32)
    whole = steps * scales.astype(numpy.float32).reshape(rows, blocks, 1)
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        raise ExportError(f"{_name(node)} has a g_idx, beside which ONNX Runtime forgets zero points; please report it")
    dtype, level = _of(node.inputs[2]).dtype, node.attributes["accuracy_level"].as_int()
    assert dtype is not None
    values = whole.reshape(rows, blocks * block)[:, :columns]
    return StoredWeight(_name(node), "MatMulNBits", bits, block, given, dtype.name, level, 0, False, values)


def _of_bitsandbytes(node: onnx_ir.Node) -> StoredWeight:
    rows, columns, kind, block = (node.attributes[name].as_int() for name in ("N", "K", "quant_type", "block_size"))
    codes, largest = (_initializer(node, index) for index in (1, 2))
    digits = numpy.unpackbits(codes.reshape(-1)).reshape(-1, 4) @ numpy.array([8, 4, 2, 1])  # the high one first
    values = numpy.array(_BOOKS[kind], numpy.float32)[digits][: rows * columns]
    whole = values * numpy.repeat(largest.reshape(-1), block)[: rows * columns]
    values = whole.reshape(rows, columns)
    return StoredWeight(_name(node), "MatMulBnb4", 4, block, False, "FLOAT", 0, kind, columns % block != 0, values)


def _numbers(bytes_: _Array, bits: int) -> _Array:
    """Little-endian numbers of so many bits."""
    digits = numpy.unpackbits(bytes_.reshape(-1), bitorder="little").reshape(-1, bits)
    return digits.astype(numpy.int64) @ (2 ** numpy.arange(bits))


def _initializer(node: onnx_ir.Node, index: int) -> _Array:
    constant = _of(node.inputs[index]).const_value
    assert constant is not None
    return numpy.asarray(constant.numpy())


def _of(value: onnx_ir.Value | None) -> onnx_ir.Value:
    assert value is not None
    return value


def _name(node: onnx_ir.Node) -> str:
    return str(_of(node.inputs[1]).name)


def _dequantized(node: onnx_ir.Node) -> StoredWeight | None:
    """The weight of a product that nodes make of initializers alone, bytes among them; None for any other product."""
    weight = node.inputs[1]
    inner: dict[onnx_ir.Node, None] = {}
    constants: dict[str, Any] = {}
    waiting = [] if weight is None or weight.producer() is None else [weight]
    while waiting:
        value = waiting.pop()
        maker = value.producer()
        if maker is not None:
            inner[maker] = None
            waiting.extend(operand for operand in maker.inputs if operand is not None)
        elif value.const_value is not None and not value.is_graph_input():
            constants[str(value.name)] = value.const_value
        else:
            return None
    codes = max((c for c in constants.values() if c.dtype.name == "UINT8"), key=lambda c: int(c.size), default=None)
    if codes is None or weight is None:
        return None
    values = _folded(node, weight, set(inner), constants).T
    name = next(name for name, constant in constants.items() if constant is codes)
    assert weight.dtype is not None
    return StoredWeight(name, "MatMul", 0, 0, False, weight.dtype.name, 0, 0, False, values)


def _folded(node: onnx_ir.Node, weight: onnx_ir.Value, inner: set[Any], constants: dict[str, Any]) -> _Array:
    """What ONNX Runtime makes of nodes that read initializers alone; in float32, which holds all that there are."""
    ir, onnx, ort = (require(name, "onnx") for name in ("onnx_ir", "onnx", "onnxruntime"))
    graph = node.graph
    assert graph is not None
    wide = f"{weight.name} in float32"
    output = onnx.helper.make_tensor_value_info(wide, onnx.TensorProto.FLOAT, None)
    nodes = [ir.serde.serialize_node(one) for one in graph if one in inner]
    nodes.append(onnx.helper.make_node("Cast", [weight.name], [wide], to=onnx.TensorProto.FLOAT))
    tensors = [
        onnx.numpy_helper.from_array(numpy.asarray(constant.numpy()), name) for name, constant in constants.items()
    ]
    made = onnx.helper.make_graph(nodes, "weight", [], [output], tensors)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opset_imports.items()]
    model = onnx.helper.make_model(made, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return numpy.asarray(session.run(None, {})[0])
