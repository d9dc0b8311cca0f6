"""Let `group_query_attention` rotate queries and keys, as ONNX Runtime's does, instead of the model.

    q = W x  ->  [b, s, h, d]  ->  [b, h, s, d]  ->  rotary  ->  [b, s, h, d]  ->  [b, s, h·d]  ->  attention
    q = W x                                                                   ->  attention that rotates

How a model writes its rotary positions is of no matter: what stands between a projection and the attention is run on
random numbers and compared with what the operator would do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from flora_fx.decoder_ops import rotate

from .evaluating import between, call, evaluate, sizes
from .views import VIEWS, before_views

__all__ = ["absorb_rotary", "count_rotary", "reads_positions"]

aten = torch.ops.aten
ATTENTION = torch.ops.flora_fx.group_query_attention.default
ROWS = torch.ops.flora_fx.rotary_rows.default
POSITIONS = torch.ops.flora_fx.positions.default

QUERY, KEY, VALUE, COS, SIN, INTERLEAVED = 0, 1, 2, 7, 8, 14
"""Arguments of the operator."""


def count_rotary(program: ExportedProgram) -> int:
    """How many look-ups of rotary tables there are."""
    return len(program.graph_module.graph.find_nodes(op="call_function", target=ROWS))


def reads_positions(program: ExportedProgram) -> bool:
    """Whether the model reads the positions that it is given, and looks up no others in rotary tables."""
    graph = program.graph_module.graph
    given = graph.find_nodes(op="call_function", target=POSITIONS)
    rows = graph.find_nodes(op="call_function", target=ROWS)
    return bool(given) and all(between(given[0], node) for node in rows)


def absorb_rotary(program: ExportedProgram) -> int:
    """Rewrite a program in place: attention rotates queries and keys itself, where both are rotated in a way it knows.

    What is not known stays as it is, computed from the same positions.

    Returns:
        how many attentions rotate now.
    """
    graph = program.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)  # true of the capture, and it would keep alive what nothing reads
    absorbed = 0
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        operands = [node.args[QUERY], node.args[KEY]]
        found = [_rotation(operand) for operand in operands if isinstance(operand, Node)]
        query, key = found if len(found) == 2 else (None, None)
        if query is not None and key is not None and query.way == key.way:
            cos, sin, interleaved = query.way
            arguments = list(node.args)
            arguments[COS], arguments[SIN], arguments[INTERLEAVED] = cos, sin, interleaved
            with graph.inserting_before(node):
                arguments[QUERY], arguments[KEY] = (_flat(node, rotation) for rotation in (query, key))
                for index in (COS, SIN):
                    arguments[index] = _in_dtype_of(node, arguments[index], arguments[QUERY])
            node.args = tuple(arguments)
            absorbed += 1
        for index in (QUERY, KEY, VALUE):
            if isinstance(operand := node.args[index], Node):
                node.update_arg(index, before_views(operand))
    for node in graph.nodes:  # the heads that attention returns are flat again where a projection reads them
        if node.op == "call_function" and node.target in VIEWS and (earlier := before_views(node)) is not node:
            node.replace_all_uses_with(earlier)
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()
    return absorbed


@dataclass(frozen=True)
class _Rotation:
    """``value`` is rotated with ``way``: the tables, and whether neighbours are rotated together."""

    value: Node
    heads_first: bool
    way: tuple[Node, Node, bool]


def _rotation(sink: Node) -> _Rotation | None:
    """How an operand [batch, seq, heads · dim] was rotated, if the operator could do the same."""
    rows = [node for node in _ancestors(sink) if node.op == "call_function" and node.target is ROWS]
    if len(rows) != 1 or not _is_position(rows[0].args[2]) or _width(rows[0].args[0]) % 8:
        return None  # 8: what ONNX Runtime's kernels ask of the tables
    value = _rotated(sink, rows[0])
    if value is None:
        return None
    cos, sin, doubled = rows[0].args[0], rows[0].args[1], rows[0].args[3]
    assert isinstance(cos, Node)
    assert isinstance(sin, Node)
    given, wanted = sizes(value), sizes(sink)
    if given is None or wanted is None or len(given) != 4:
        return None
    random = torch.Generator().manual_seed(0)
    x = torch.randn(given, generator=random, dtype=torch.float64)
    angles = torch.rand(*wanted[:2], sizes(cos)[1], generator=random, dtype=torch.float64)  # type: ignore[index]
    tables = (angles.cos() * 1.5, angles.sin() * 1.5)
    twice = [t.repeat_interleave(2, -1) if doubled else torch.cat([t, t], -1) for t in tables]
    nodes = [node for node in _unique(between(value, sink), between(rows[0], sink)) if node is not value]
    try:
        found = evaluate(nodes, {value: x, rows[0]: tuple(twice)})
    except (KeyError, RuntimeError):  # it needs something else besides
        return None
    rounding = max(1e-5, 8 * torch.finfo(found.dtype).eps)  # some rotate in float32, and return what they were given
    for heads_first, interleaved in itertools.product((True, False), (False, True)):
        if x.shape[2 if heads_first else 1] != wanted[1]:
            continue
        flat = rotate(x.transpose(1, 2) if heads_first else x, *tables, interleaved).flatten(2)
        if flat.shape == found.shape and torch.allclose(flat, found.double(), rtol=rounding, atol=rounding):
            return _Rotation(value, heads_first, (cos, sin, interleaved))
    return None


def _ancestors(node: Node) -> list[Node]:
    """What a value is computed from, back to projections and other attentions."""
    seen: dict[Node, None] = {}
    pending = [node]
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand not in seen:
                seen[operand] = None
                if operand.target not in (aten.linear.default, ATTENTION, ROWS):
                    pending.append(operand)
    return list(seen)


def _is_position(node: object) -> bool:
    while isinstance(node, Node) and node.target in VIEWS:
        node = node.args[0]
    return isinstance(node, Node) and node.target is POSITIONS


def _width(table: object) -> int:
    shape = sizes(table) if isinstance(table, Node) else None
    return shape[-1] if shape else 0


def _rotated(sink: Node, rows: Node) -> Node | None:
    """The value that was rotated: the last one that all of the rotation comes from, but for its angles."""
    order = {node: index for index, node in enumerate(sink.graph.nodes)}
    turned = {*between(rows, sink)}
    if sink not in turned:
        return None
    frontier = {
        operand for node in turned for operand in _tensors(node) if operand not in turned and operand is not rows
    }
    while len(frontier) > 1:
        last = max(frontier, key=order.__getitem__)
        frontier.remove(last)
        if not (operands := set(_tensors(last))):
            return None
        frontier |= operands
    value = next(iter(frontier), None)
    while value is not None and value.target in (aten.to.dtype, aten._to_copy.default, aten.clone.default):
        value = value.all_input_nodes[0]
    return value


def _tensors(node: Node) -> Iterator[Node]:
    return (
        operand for operand in node.all_input_nodes if isinstance(operand.meta.get("val"), torch.Tensor | tuple | list)
    )


def _unique(*groups: list[Node]) -> list[Node]:
    members = {node for group in groups for node in group}
    return [node for node in next(iter(members)).graph.nodes if node in members] if members else []


def _in_dtype_of(attention: Node, table: Any, operand: Any) -> Node:
    """A table as the operator takes it: in the dtype of what it rotates (OLMo 2 has them in float32)."""
    dtype = operand.meta["val"].dtype
    found: Node = table if table.meta["val"].dtype == dtype else _beside(attention, aten.to.dtype, table, dtype)
    return found


def _flat(attention: Node, rotation: _Rotation) -> Node:
    """What was rotated, as [batch, seq, heads · dim]."""
    node = rotation.value
    if rotation.heads_first:
        node = _beside(attention, aten.transpose.int, node, 1, 2)
    return _beside(attention, aten.flatten.using_ints, node, 2)


def _beside(attention: Node, target: object, *args: object) -> Node:
    """A new node, of the module that the attention is of: of the same layer."""
    node = call(attention.graph, target, *args)
    if "nn_module_stack" in attention.meta:
        node.meta["nn_module_stack"] = attention.meta["nn_module_stack"]
    return node
