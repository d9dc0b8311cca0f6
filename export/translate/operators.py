"""The operators of decoders, one by one: what each is in ONNX.

A decoder is written with few operators, and by now they are known. Whoever meets another one, or one of these used in
a way that is not known, raises `Unknown`: then `torch.onnx` translates the whole program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor
from torch.fx import Node

from flora_fx.decoder_ops import rotary_rows  # noqa: F401  registers the operators

from .nodes import Nodes

__all__ = ["OPERATORS", "Unknown", "Writing", "Written", "value_of"]

aten = torch.ops.aten

Written: TypeAlias = "ir.Value | tuple[ir.Value, ...]"

_ALL = 2**63 - 1
"""Where a slice stops that goes to the end."""


class Unknown(Exception):  # noqa: N818
    """An operator, or a use of one, that is not known here."""


class Writing(Protocol):
    """What an operator is written with."""

    nodes: Nodes

    def value(self, node: Any) -> Any:
        """What a value of the program is in the graph: a value, or a tuple of them."""

    def size(self, number: Any) -> ir.Value:
        """A symbolic size, [1]."""

    def transposed(self, weight: Any) -> ir.Value:
        """A matrix, transposed."""


Operator = Callable[[Writing, Node], Written]


def value_of(node: Any) -> Tensor:
    """A tensor as it was while the program was captured.

    Raises:
        Unknown: it is none.
    """
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, Tensor):
        raise Unknown(f"{node}, which is no tensor")
    return value


def _arguments(node: Node, *handled: str) -> list[Any]:
    """Arguments by name; all others must be what they are by default.

    Raises:
        Unknown: they are not.
    """
    target: Any = node.target
    known: dict[str, Any] = {}
    for index, parameter in enumerate(target._schema.arguments):
        default = parameter.default_value if parameter.has_default_value() else None
        given = node.args[index] if index < len(node.args) else node.kwargs.get(parameter.name, default)
        if parameter.name not in handled and given != default:
            raise Unknown(f"{target} with {parameter.name}={given}")
        known[parameter.name] = given
    return [known[name] for name in handled]


def _identity(w: Writing, node: Node) -> ir.Value:
    """What leaves its operand as it is."""
    return w.value(node.args[0])


def _cast(w: Writing, node: Node) -> ir.Value:
    """What changes the dtype, and no more."""
    return _as(w, w.value(node.args[0]), value_of(node.args[0]), value_of(node))


def _as(w: Writing, value: ir.Value, found: Tensor, like: Tensor) -> ir.Value:
    if found.dtype == like.dtype:
        return value
    return w.nodes.add("Cast", [value], [like], to=int(from_torch_dtype(like.dtype)))[0]


def _dropout(w: Writing, node: Node) -> ir.Value:
    x, _, train = _arguments(node, "input", "p", "train")
    if train:
        raise Unknown("dropout in training")
    return w.value(x)


def _binary(op: str) -> Operator:
    def write(w: Writing, node: Node) -> ir.Value:
        like = value_of(node)
        x, other = _arguments(node, "self", "other")
        if type(other) in (int, float) and other == _NEUTRAL[op] and value_of(x).dtype == like.dtype:
            return w.value(x)
        operands = [_operand(w, operand, like.dtype) for operand in (x, other)]
        return w.nodes.add(op, operands, [like])[0]

    return write


_NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}


def _operand(w: Writing, operand: Any, dtype: torch.dtype) -> ir.Value:
    """A tensor or a number, in the dtype of the result."""
    if isinstance(operand, float) and dtype.is_floating_point:
        return w.nodes.constant(operand, dtype)
    if type(operand) is int:
        return w.nodes.constant(float(operand) if dtype.is_floating_point else operand, dtype)
    if value_of(operand).dtype != dtype:
        raise Unknown(f"{value_of(operand).dtype} beside {dtype}")
    return w.value(operand)


def _unary(op: str) -> Operator:
    def write(w: Writing, node: Node) -> ir.Value:
        return w.nodes.add(op, [w.value(*_arguments(node, "self"))], [value_of(node)])[0]

    return write


def _power(w: Writing, node: Node) -> ir.Value:
    x, exponent = _arguments(node, "self", "exponent")
    dtype = value_of(x).dtype
    if not dtype.is_floating_point or not isinstance(exponent, int | float):
        raise Unknown(f"{dtype} to the power of {exponent}")
    return w.nodes.add("Pow", [w.value(x), w.nodes.constant(float(exponent), dtype)], [value_of(node)])[0]


def _rsqrt(w: Writing, node: Node) -> ir.Value:
    (root,) = w.nodes.add("Sqrt", [w.value(*_arguments(node, "self"))], [value_of(node)])
    return w.nodes.add("Reciprocal", [root], [value_of(node)])[0]


def _silu(w: Writing, node: Node) -> ir.Value:
    x, like = w.value(*_arguments(node, "self")), value_of(node)
    if like.dtype == torch.bfloat16:  # QuickGelu has no kernel
        (gate,) = w.nodes.add("Sigmoid", [x], [like])
        return w.nodes.add("Mul", [x, gate], [like])[0]
    return w.nodes.add("QuickGelu", [x], [like], domain="com.microsoft", alpha=1.0)[0]


def _gelu(w: Writing, node: Node) -> ir.Value:
    x, approximate = _arguments(node, "self", "approximate")
    return w.nodes.add("Gelu", [w.value(x)], [value_of(node)], approximate=approximate)[0]


def _linear(w: Writing, node: Node) -> ir.Value:
    x, weight, bias = _arguments(node, "input", "weight", "bias")
    like = value_of(node)
    operands = [x, weight] if bias is None else [x, weight, bias]
    if like.dim() == 2:
        given = [w.value(operand) for operand in operands]
        return w.nodes.add("Gemm", given, [like], alpha=1.0, beta=1.0, transA=0, transB=1)[0]
    (product,) = w.nodes.add("MatMul", [w.value(x), w.transposed(weight)], [like])
    return product if bias is None else w.nodes.add("Add", [product, w.value(bias)], [like])[0]


def _layer_norm(w: Writing, node: Node) -> ir.Value:
    names = ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")
    x, shape, weight, bias, epsilon, _ = _arguments(node, *names)
    operands = [operand for operand in (x, weight, bias) if operand is not None]
    alike = {value_of(operand).dtype for operand in operands} == {value_of(node).dtype}
    if len(shape) != 1 or weight is None or not alike:
        raise Unknown("a layer norm of several dimensions or dtypes, or without weights")
    given = [w.value(operand) for operand in operands]
    return w.nodes.add("LayerNormalization", given, [value_of(node)], axis=-1, epsilon=epsilon, stash_type=1)[0]


def _embedding(w: Writing, node: Node) -> ir.Value:
    names = ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse")  # the last three are of training
    weight, indices, *_ = _arguments(node, *names)
    return w.nodes.add("Gather", [w.value(weight), w.value(indices)], [value_of(node)], axis=0)[0]


def _reduced(op: str) -> Operator:
    def write(w: Writing, node: Node) -> ir.Value:
        x, dims, keep = _arguments(node, "self", "dim", "keepdim")
        if not dims or value_of(x).dtype != value_of(node).dtype:
            raise Unknown(f"{node.target} of all, or in another dtype")
        given = [w.value(x), w.nodes.constant([*dims], torch.int64)]
        return w.nodes.add(op, given, [value_of(node)], keepdims=int(keep), noop_with_empty_axes=0)[0]

    return write


def _cat(w: Writing, node: Node) -> ir.Value:
    parts, dim = _arguments(node, "tensors", "dim")
    if any(value_of(part).dtype != value_of(node).dtype for part in parts):
        raise Unknown("parts of several dtypes")
    return w.nodes.add("Concat", [w.value(part) for part in parts], [value_of(node)], axis=dim)[0]


def _split(w: Writing, node: Node) -> tuple[ir.Value, ...]:
    """By sizes or by number: what the parts are is seen from their shapes."""
    parts = node.meta["val"]
    x, dim = _arguments(node, "self", "dim", *_HOW_SPLIT[node.target])[:2]
    axis = dim % value_of(x).dim()
    sizes = [part.shape[axis] for part in parts]
    if not all(isinstance(size, int) for size in sizes):
        raise Unknown("parts whose sizes are not known")
    if node.target is not aten.split_with_sizes.default and len({*sizes}) == 1:
        return w.nodes.add("Split", [w.value(x)], parts, axis=axis, num_outputs=len(parts))
    return w.nodes.add("Split", [w.value(x), w.nodes.constant(sizes, torch.int64)], parts, axis=axis)


_HOW_SPLIT: dict[object, tuple[str]] = {
    aten.split_with_sizes.default: ("split_sizes",),
    aten.split.Tensor: ("split_size",),
    aten.chunk.default: ("chunks",),
}


def _item(w: Writing, node: Node) -> ir.Value:
    return w.value(node.args[0])[node.args[1]]


def _view(w: Writing, node: Node) -> ir.Value:
    """Of any kind: its shape is what the capture says."""
    found, wanted = value_of(node.args[0]), value_of(node)
    if [*map(str, found.shape)] == [*map(str, wanted.shape)]:
        return w.value(node.args[0])
    known = [size if isinstance(size, int) else -1 for size in wanted.shape]
    if -1 not in known or (len(known) == 2 and known.count(-1) == 1):
        shape = w.nodes.constant(known, torch.int64)
    else:
        open_ = _left_open(node)
        parts = [
            w.size(size)
            if known[dim] < 0 and dim != open_
            else w.nodes.constant([-1 if dim == open_ else size], torch.int64)
            for dim, size in enumerate(wanted.shape)
        ]
        (shape,) = w.nodes.add("Concat", parts, [_numbers(len(parts))], axis=0)
    return w.nodes.add("Reshape", [w.value(node.args[0]), shape], [wanted], allowzero=1)[0]


def _left_open(node: Node) -> int | None:
    """The dimension that a view leaves to be computed, where a trace leaves it, too: one shape for several."""
    sizes: Any = node.args[1]
    if node.target not in (aten.view.default, aten.reshape.default) or -1 not in sizes:
        return None
    free = node.target is aten.view.default or value_of(node.args[0]).is_contiguous()
    return sizes.index(-1) if free else None


def _numbers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _transpose(w: Writing, node: Node) -> ir.Value:
    order = [*range(value_of(node).dim())]
    if node.target is aten.permute.default:
        order = [order[dim] for dim in _arguments(node, "self", "dims")[1]]
    else:
        one, other = (0, 1) if node.target is aten.t.default else _arguments(node, "self", "dim0", "dim1")[1:]
        order[one], order[other] = order[other], order[one]
    return w.nodes.add("Transpose", [w.value(node.args[0])], [value_of(node)], perm=order)[0]


def _unsqueeze(w: Writing, node: Node) -> ir.Value:
    x, dim = _arguments(node, "self", "dim")
    axes = w.nodes.constant([dim % value_of(node).dim()], torch.int64)
    return w.nodes.add("Unsqueeze", [w.value(x), axes], [value_of(node)])[0]


def _slice(w: Writing, node: Node) -> ir.Value:
    x, dim, start, stop, step = _arguments(node, "self", "dim", "start", "end", "step")
    start, stop = 0 if start is None else start, _ALL if stop is None else stop
    if not all(isinstance(number, int) for number in (start, stop, step)):
        raise Unknown("a slice whose sizes are not known")
    axis = dim % value_of(x).dim()
    size = value_of(x).shape[axis]
    if (start, step) == (0, 1) and stop >= (size if isinstance(size, int) else _ALL):
        return w.value(x)
    numbers = [w.nodes.constant([number], torch.int64) for number in (start, stop, axis, step)]
    return w.nodes.add("Slice", [w.value(x), *numbers], [value_of(node)])[0]


def _scalar(w: Writing, number: Any) -> ir.Value:
    """A symbolic size, []."""
    return w.nodes.add("Squeeze", [w.size(number)], [_numbers()])[0]


def _positions(w: Writing, node: Node) -> ir.Value:
    lengths, ids = _arguments(node, "seqlens_k", "input_ids")
    found, wanted = value_of(lengths), value_of(node)
    rows, add = found.to(torch.int64), w.nodes.add
    zero, one, first = (w.nodes.constant(number, torch.int64) for number in (0, 1, [1]))
    length = _scalar(w, value_of(ids).shape[1])
    (tokens,) = add("Add", [_as(w, w.value(lengths), found, rows), one], [rows])
    (past,) = add("Sub", [tokens, length], [rows])
    (past,) = add("Clip", [past, zero], [rows])  # shorter rows of a prompt begin at 0 as well
    (past,) = add("Unsqueeze", [past, first], [rows[:, None]])
    (steps,) = add("Range", [zero, length, one], [wanted[0]])
    return add("Add", [past, steps], [wanted])[0]


def _attention(w: Writing, node: Node) -> tuple[ir.Value, ...]:
    given: tuple[Any, ...] = node.args
    tensors, (total, cos, sin, heads, kv_heads, scale, window, softcap, interleaved) = given[:6], given[6:]
    size = total.meta["val"] if isinstance(total, Node) else total
    if isinstance(size, int):
        raise Unknown("attention to caches of one size")
    length = _as(w, _scalar(w, size), _numbers(), _numbers(dtype=torch.int32))
    values = [None if tensor is None else w.value(tensor) for tensor in tensors]
    values += [length, *(w.value(table) for table in (cos, sin) if table is not None)]
    return w.nodes.add(
        "GroupQueryAttention",
        values,
        node.meta["val"],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=scale,
        local_window_size=window,
        softcap=softcap,
        do_rotary=int(cos is not None),
        rotary_interleaved=int(interleaved),
    )


OPERATORS: dict[object, Operator] = {
    operator.getitem: _item,
    aten.add.Tensor: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.pow.Tensor_Scalar: _power,
    aten.rsqrt.default: _rsqrt,
    aten.neg.default: _unary("Neg"),
    aten.tanh.default: _unary("Tanh"),
    aten.relu.default: _unary("Relu"),
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten.linear.default: _linear,
    aten.layer_norm.default: _layer_norm,
    aten.embedding.default: _embedding,
    aten.mean.dim: _reduced("ReduceMean"),
    aten.sum.dim_IntList: _reduced("ReduceSum"),
    aten.cat.default: _cat,
    **dict.fromkeys(_HOW_SPLIT, _split),
    aten.slice.Tensor: _slice,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.flatten.using_ints: _view,
    aten.unflatten.int: _view,
    aten.transpose.int: _transpose,
    aten.permute.default: _transpose,
    aten.t.default: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast,
    aten._to_copy.default: _cast,
    aten.type_as.default: _cast,
    aten.clone.default: _identity,
    aten.contiguous.default: _identity,
    aten.alias.default: _identity,
    aten.detach.default: _identity,
    aten.dropout.default: _dropout,
    torch.ops.flora_fx.positions.default: _positions,
    torch.ops.flora_fx.group_query_attention.default: _attention,
}
"""What is known, by the operator of the program."""
