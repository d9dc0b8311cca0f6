"""Decide which paths may be written, and which weights may be stored anew.

accepted    a path whose weights, result and value added to have one dtype
down only   adapters of another dtype than their base: their A's form packs of their own, the rest stays as it is
cast        the same with allow_cast: as accepted, with copies of A and B in the base's dtype
private     a weight that one projection alone reads: only such a weight may move into a pack
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from flora_fx.errors import AdapterError
from flora_fx.graph.program import Program
from flora_fx.internals import FakeTensor
from flora_fx.ir import Decline, LowRankPath, Projection, Reason
from flora_fx.passes.analysis.operations import ADDS, ASSERTS, CASTS, WEIGHT_VIEWS, operation, readers
from flora_fx.passes.analysis.paths import Paths
from flora_fx.passes.analysis.projections import Projections
from flora_fx.passes.analysis.values import Values
from flora_fx.passes.context import Context

__all__ = ["Decisions", "adapted_projection", "decide"]


@dataclass(frozen=True, eq=False)
class Decisions:
    """What may be done.

    Attributes:
        paths: the paths to write.
        downs: the down-projections to pack, those of `paths` among them.
        shared: the nodes of projections whose weight or bias something else uses too, and how.
    """

    paths: tuple[LowRankPath, ...]
    downs: tuple[Projection, ...]
    shared: Mapping[Node, str]


def decide(context: Context) -> Decisions:
    """Accept or decline each path.

    Raises:
        AdapterError: an adapter weight holds NaN or infinity.
    """
    program, values, projections = context.program, context[Values], context[Projections]
    by_node = projections.by_node()
    shared = _shared(program, values, projections)
    accepted: list[LowRankPath] = []
    downs: dict[Node, Projection] = {}
    for path in context[Paths]:
        _require_finite(path)
        base = adapted_projection(values, by_node, path.onto)
        wanted = program.dtype(path.onto) or (base.dtype if base else None)
        computed = {program.dtype(part.node) or part.dtype for part in (path.up, path.down)}
        if path.up.dtype == path.down.dtype and computed == {wanted}:
            accepted.append(path)
            downs.setdefault(path.down.node, path.down)
            continue
        cast = None
        trains = program.trains([path.up.weight, path.down.weight])  # a copy would go stale with the next step
        may_cast = program.copies and not trains and base and base.held is None and base.dtype == wanted
        if base and may_cast and shared.keys().isdisjoint((base.node, path.down.node)):
            cast = _without_cast(values, path, base)
        if cast is not None and context.config.allow_cast:
            accepted.append(cast)
            downs.setdefault(cast.down.node, cast.down)
            continue
        downs.setdefault(path.down.node, path.down)
        remedy = "convert one of them" if cast is None else "convert one of them, or pass FuseConfig(allow_cast=True)"
        detail = f"{_difference(program, path, wanted)}; {remedy}"
        context.declines.append(Decline(Reason.DTYPE_DIFFERS, path.add.name, detail))
    return Decisions(tuple(accepted), tuple(downs.values()), shared)


def _difference(program: Program, path: LowRankPath, wanted: torch.dtype | None) -> str:
    """Two dtypes of a path that differ."""
    up, down = path.up, path.down
    if up.dtype != down.dtype:
        return f"{up.weight.name} is {_name(up.dtype)} and {down.weight.name} is {_name(down.dtype)}"
    for part in (up, down):
        computed = program.dtype(part.node) or part.dtype
        if up.dtype == wanted != computed:
            return f"{part.node.name} computes in {_name(computed)} and {path.onto.name} is {_name(wanted)}"
    return f"{up.weight.name} is {_name(up.dtype)} and {path.onto.name} is {_name(wanted)}"


def _name(dtype: torch.dtype | None) -> str:
    return "of unknown dtype" if dtype is None else str(dtype).removeprefix("torch.")


def adapted_projection(values: Values, by_node: dict[Node, Projection], node: Node) -> Projection | None:
    """The projection that a value is the output of, through reshapes and earlier adapters."""
    node = values.earliest_rows(node)
    while node not in by_node and operation(node) in ADDS and isinstance(node.args[0], Node):
        node = values.earliest_rows(node.args[0])
    return by_node.get(node)


def _without_cast(values: Values, path: LowRankPath, base: Projection) -> LowRankPath | None:
    """The path reading the value before it was cast to the adapter's dtype, if that is what its base reads."""
    read = path.down.reads
    if operation(read) not in CASTS or values.earliest_rows(read.all_input_nodes[0]) is not base.reads:
        return None
    if path.factors or path.up.bias or path.down.bias or not _is_sole_way(path.down.node, path.up.node):
        return None
    down = replace(path.down, reads=base.reads, operand=base.operand, cast_to=base.weight)
    return replace(path, down=down, up=replace(path.up, cast_to=base.weight))


def _is_sole_way(down: Node, up: Node) -> bool:
    """Whether what stands between the two is read by the up-projection alone, and cast by nothing."""
    node = down
    while node is not up:
        found = readers(node)
        if len(found) != 1 or operation(node) in CASTS:
            return False
        node = found[0]
    return True


def _require_finite(path: LowRankPath) -> None:
    for weight in (path.down.weight, path.up.weight):
        tensor = weight.tensor
        if tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
            continue
        if not bool(torch.isfinite(tensor.detach()).all()):
            raise AdapterError(
                f"the adapter weight {weight.name} holds NaN or infinity. "
                "Load a sound checkpoint of this adapter; the model is as it was."
            )


def _shared(program: Program, values: Values, projections: Iterable[Projection]) -> dict[Node, str]:
    """Projections with a weight or bias that another node reads, or that overlaps another parameter in memory."""
    used_by: dict[int, set[Node]] = defaultdict(set)
    tensors: dict[int, Tensor] = {}
    for node in program.graph.nodes:
        for tensor in _read_by(program, values, node):
            used_by[id(tensor)].add(node)
            tensors[id(tensor)] = tensor
    overlapping = _overlapping(tensors.values())

    found: dict[Node, str] = {}
    for projection in projections:
        for weight in (projection.bias, projection.weight, *(projection.held.stored if projection.held else ())):
            if weight is not None and id(weight.tensor) in overlapping:
                found[projection.node] = f"{weight.name} shares memory with another parameter"
            if weight is not None and len(used_by[id(weight.tensor)]) != 1:
                found[projection.node] = f"{weight.name} is also used elsewhere"
    return found


def _read_by(program: Program, values: Values, node: Node) -> Iterator[Tensor]:
    """The parameters that a node computes with, but for those it only shows in another shape, order or dtype."""
    if node.op == "call_module":
        module = program.attribute(str(node.target))
        yield from (*module.parameters(), *module.buffers())
    elif node.op in ("call_function", "call_method", "output") and operation(node) not in ASSERTS:
        for operand in node.all_input_nodes:
            weight = values.weight(operand) or program.weight(values.earliest(operand))
            if weight is not None and not (operation(node) in WEIGHT_VIEWS and values.weight(node) is not None):
                yield weight.tensor


def _overlapping(tensors: Iterable[Tensor]) -> set[int]:
    """The ids of tensors that share memory with another one of them."""
    by_storage: dict[int, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.layout is torch.strided:
            by_storage[tensor.untyped_storage()._cdata].append(tensor)
    found: set[int] = set()
    for group in by_storage.values():
        ordered = sorted(group, key=Tensor.storage_offset)
        for index, first in enumerate(ordered):
            for second in ordered[index + 1 :]:
                if second.storage_offset() >= first.storage_offset() + _extent(first):
                    break
                if not _interleaved(first, second):
                    found |= {id(first), id(second)}
    return found


def _extent(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _interleaved(first: Tensor, second: Tensor) -> bool:
    """Two column ranges of one matrix (blocks of a pack): they alternate in memory and share nothing."""
    spans = []
    for tensor in (first, second):
        strides = sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True)
        if tensor.dim() != 2 or strides[1][0] != 1:
            return False
        spans.append((strides[0][0], tensor.storage_offset() % strides[0][0], strides[1][1]))
    (stride, a, width), (other, b, _) = sorted(spans, key=lambda s: s[1])
    return stride == other and a + width <= b
