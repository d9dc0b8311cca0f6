"""Adds nodes to a graph, in the functions that its kind calls, each with the metadata that its neighbours have.

Every method that adds does so at the graph's insertion point.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx import Node

from flora_fx.internals import enable_python_dispatcher, pytree
from flora_fx.ops import accumulate, accumulate_unrolled

from .examples import Examples, same_sizes

__all__ = ["Builder", "Dialect", "ExportedBuilder"]

aten = torch.ops.aten

_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")


@dataclass(frozen=True)
class Dialect:
    """The functions that new nodes call."""

    linear: Any = F.linear
    split: Any = torch.split_with_sizes
    reshape: Any = torch.reshape
    transpose: Any = torch.t
    mul: Any = operator.mul
    div: Any = operator.truediv
    add: Any = operator.add
    cat: Any = torch.cat


class Builder:
    """Adds nodes.

    Args:
        graph: where they are added.
        examples: the example values of its nodes.
        ops: the functions that new nodes call.
    """

    origin: Node | None = None
    """The node that is being rewritten: new nodes take over where it came from."""
    leaves_rest = True
    """Whether a part of a split that nothing reads costs less than slices instead of the split."""
    picks = True
    """Whether a loop may read weights at places that are computed."""

    def __init__(self, graph: fx.Graph, examples: Examples, ops: Dialect) -> None:
        self.graph = graph
        self.examples = examples
        self.ops = ops

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add a node with metadata computed from its arguments'."""
        node = self.graph.call_function(target, args, kwargs)
        if self.origin is not None:
            node.meta = {key: self.origin.meta[key] for key in _PROVENANCE if key in self.origin.meta}
        self.annotate(node)
        return node

    def linear(self, x: Node, weight: Node, bias: Node | None) -> Node:
        """``x @ weightᵀ + bias``."""
        return self.call(self.ops.linear, x, weight, *(() if bias is None else (bias,)))

    def widened_linear(self, x: Node, others: Sequence[Node], weight: Node, bias: Node | None) -> Node:
        """``[x, others…] @ weightᵀ + bias``, of values in one shape but for the last dimension."""
        return self.linear(self.call(self.ops.cat, [x, *others], -1), weight, bias)

    def slice_last(self, x: Node, width: int, ranges: Sequence[tuple[int, int]]) -> list[Node]:
        """Ranges of the last dimension (of size ``width``): one split where they tile it, one slice each elsewhere."""
        if list(ranges) == [(0, width)]:
            return [x]
        tiles = list(ranges)
        if self.leaves_rest and len(tiles) > 1 and tiles[-1][1] < width:
            tiles.append((tiles[-1][1], width))
        if tiles[0][0] == 0 and tiles[-1][1] == width and all(a[1] == b[0] for a, b in pairwise(tiles)):
            parts = self.call(self.ops.split, x, [stop - start for start, stop in tiles], -1)
            return [self.call(operator.getitem, parts, index) for index in range(len(ranges))]
        return [
            x if (start, stop) == (0, width) else self.call(aten.slice.Tensor, x, -1, start, stop)
            for start, stop in ranges
        ]

    def reshape_rows(self, x: Node, rows_of: Node, features: int) -> Node:
        """``x`` with the leading dimensions of ``rows_of`` and ``features`` at the end."""
        value = self.value(rows_of)
        if value is None:
            leading = self.call(operator.getitem, self.call(getattr, rows_of, "shape"), slice(None, -1))
            return self.call(self.ops.reshape, x, self.call(operator.add, leading, (features,)))
        if value.dim() == 2:
            return self.call(self.ops.reshape, x, [-1, features])
        return self.call(self.ops.reshape, x, [*self.sizes(rows_of)[:-1], features])

    def reshape_to(self, x: Node, shape_of: Node) -> Node:
        """``x`` in the shape of ``shape_of``, which has as many elements."""
        found, wanted = self.value(x), self.value(shape_of)
        if found is None or wanted is None or same_sizes(found.shape, wanted.shape):
            return x
        return self.call(self.ops.reshape, x, self.sizes(shape_of))

    def reshape_beside(self, x: Node, other: Node, features: int) -> Node:
        """``x``, whose last dimension is ``features``, in the leading dimensions of ``other``, to be joined with it."""
        found, wanted = self.value(x), self.value(other)
        if found is None or wanted is None or same_sizes(found.shape[:-1], wanted.shape[:-1]):
            return x
        return self.reshape_rows(x, other, features)

    def sizes(self, x: Node) -> list[int | Node]:
        """The sizes of a node: numbers where they are fixed, nodes where they are dynamic."""
        return [
            size if isinstance(size, int) else self.call(aten.sym_size.int, x, dim)
            for dim, size in enumerate(self.value(x).shape)
        ]

    def cast(self, x: Node, dtype: torch.dtype) -> Node:
        """``x`` in another dtype."""
        return self.call(aten.to.dtype, x, dtype)

    def contiguous(self, x: Node) -> Node:
        """``x`` in row-major order."""
        return self.call(aten.clone.default, x, memory_format=torch.contiguous_format)

    def accumulate(self, y: Node, z: Node, up: Node, scale: float) -> Node:
        """``y + scale · z @ upᵀ``, `flora_fx.ops.accumulate`."""
        return self.call(accumulate, y, z, up, scale)

    def unrolled(self, y: Node, z: Node, up: Node, scale: float) -> Node:
        """The same as a product and a sum, `flora_fx.ops.accumulate_unrolled`."""
        return self.call(accumulate_unrolled, y, z, up, scale)

    def product_and_sum(self, y: Node, z: Node, up: Node, scale: float) -> Node:
        """``y + scale · Σ z · up`` over the last dimension of both, in float32 where y's dtype is smaller."""
        dtype = self.value(y).dtype
        wide = torch.promote_types(dtype, torch.float32)
        z, up = (node if self.value(node).dtype == wide else self.cast(node, wide) for node in (z, up))
        delta = self.call(aten.sum.dim_IntList, self.call(aten.mul.Tensor, z, up), [-1])
        if scale != 1.0:
            delta = self.call(aten.mul.Tensor, delta, scale)
        found = self.call(aten.add.Tensor, y, delta)
        return found if wide == dtype else self.cast(found, dtype)

    def annotate(self, node: Node) -> None:
        """Give a new node the example value that its neighbours have.

        It gets none where one of them is unknown: ``FakeTensorProp`` of torch 2.11 writes None for a size.
        """
        operands = [self.value(n) for n in node.all_input_nodes]
        mode = self.examples.mode
        if mode is None or any(value is None for value in pytree.tree_leaves(operands)):
            return
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        # Without Python's dispatcher a composite operator (linear, reshape) decomposes in C++, which asks a tensor of
        # symbolic sizes for numbers (torch 2.11); torch.export traces under it, too.
        with mode, torch.no_grad(), enable_python_dispatcher():
            function: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
            rest = args[1:] if node.op == "call_method" else args
            self.examples.give(node, function(*rest, **kwargs))

    def value(self, node: Node) -> Any:
        """The example value of a node, or None."""
        return self.examples.value(node)


class ExportedBuilder(Builder):
    """Adds ATen operators only, as an exported program holds them: flora_fx's own functions are written out.

    Layers that are alike have the same example values (see `SharedExamples`); what was computed of them is known.
    """

    def __init__(self, graph: fx.Graph, examples: Examples, ops: Dialect) -> None:
        super().__init__(graph, examples, ops)
        self._known: dict[Hashable, tuple[Any, list[Any]]] = {}  # with its operands, so that their ids stay theirs

    def annotate(self, node: Node) -> None:
        """See `Builder.annotate`."""
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        operands = [self.value(leaf) if isinstance(leaf, Node) else leaf for leaf in leaves]
        told = (id(one) if isinstance(one, Tensor | tuple | list) else (type(one), str(one)) for one in operands)
        key = (node.target, str(spec), *told)
        if key in self._known:
            self.examples.give(node, self._known[key][0])
            return
        super().annotate(node)
        if (value := self.value(node)) is not None:
            self._known[key] = value, operands

    leaves_rest = False
    picks = False

    def accumulate(self, y: Node, z: Node, up: Node, scale: float) -> Node:
        shape = self.value(y).shape
        transposed = self.call(self.ops.transpose, up)
        if len(shape) == 2 and len(self.value(z).shape) == 2:
            return self.call(aten.addmm.default, y, z, transposed, alpha=scale)
        y2 = self.call(self.ops.reshape, y, [-1, shape[-1]])
        z2 = self.call(self.ops.reshape, z, [-1, self.value(z).shape[-1]])
        rows = self.call(aten.addmm.default, y2, z2, transposed, alpha=scale)
        return self.call(aten.view.default, rows, self.sizes(y))

    def unrolled(self, y: Node, z: Node, up: Node, scale: float) -> Node:
        low = self.call(self.ops.reshape, z, [*self.sizes(y)[:-1], 1, self.value(z).shape[-1]])
        return self.product_and_sum(y, low, up, scale)
