"""Which nodes hold equal values: through no-ops, and through the same operation done twice.

    dropout(x, 0.1, False)   to(x, x.dtype)   clone(x)   expand(x, x.shape)      all equal x
    view(x, s)               view(x, s)                                          equal each other
    view(view(x, s), t)                                                          equals view(x, t)

Values that are changed in place, or share memory with one that is, equal nothing but themselves (see `mutation`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from flora_fx.graph.program import Program, same_sizes
from flora_fx.internals import OpOverload, OpOverloadPacket
from flora_fx.ir import Weight

from .mutation import Effects

__all__ = ["DROPOUTS", "Values", "dependencies", "operation"]

aten = torch.ops.aten

RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    torch.reshape,
    "view",
    "reshape",
}
CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    "to",
    "float",
    "double",
    "half",
    "bfloat16",
    "type",
    "type_as",
}
COPIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    torch.clone,
    "clone",
    "contiguous",
}
EXPANDS = {aten.expand.default, "expand"}
TRANSPOSES = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
    aten.mT.default,
    torch.t,
    torch.transpose,
    torch.permute,
    "t",
    "transpose",
    "permute",
    "T",
    "mT",
}
SIZES = {"size", "shape"}
DROPOUTS = {aten.dropout.default, F.dropout, torch.dropout}
SHOWS_A_WEIGHT = TRANSPOSES | EXPANDS | RESHAPES | CASTS | COPIES
MERGED = RESHAPES | CASTS | TRANSPOSES | EXPANDS | SIZES
TORCHS_OWN = ("aten", "prims")


def operation(node: Node) -> Any:
    """What a node does: the function, or the name of the method or tensor attribute."""
    if node.op == "call_function":
        if node.target is getattr and isinstance(node.args[1], str):
            return node.args[1]
        if isinstance(node.target, OpOverloadPacket) and "default" in node.target.overloads():
            # A tensor's attribute in Dynamo's graphs (torch 2.14): x.T is aten.numpy_T(x), its overload unnamed.
            return node.target.default if len(node.args) == 1 and not node.kwargs else node.target
        return node.target
    return node.target if node.op == "call_method" else None


def dependencies(node: Node) -> set[Node]:
    """A node and all that it is computed from."""
    found, pending = {node}, [node]
    while pending:
        new = [operand for operand in pending.pop().all_input_nodes if operand not in found]
        found.update(new)
        pending.extend(new)
    return found


class Values:
    """Equal values, and what is known of their dtypes and shapes."""

    def __init__(self, program: Program, effects: Effects) -> None:
        self.program = program
        self.effects = effects
        self.eval_only: set[str] = set()
        self._source: dict[Node, Node] = {}
        self._first: dict[Hashable, Node] = {}
        # In graph order, so that the first of several equal nodes represents them and is defined before them all.
        for node in program.graph.nodes:
            self._source[node] = self._represent(node)

    def source(self, node: Node) -> Node:
        """The earliest node that holds the same value."""
        return self._source.get(node, node)

    def rows(self, node: Node) -> Node:
        """The same up to flattening: strips reshapes that leave the last dimension as it is."""
        node = self.source(node)
        while operation(node) in RESHAPES and self._keeps_last(node):
            node = self.source(node.all_input_nodes[0])
        return node

    def shape(self, node: Node) -> tuple[Any, ...] | None:
        """The shape of a node's tensor; None where it is not known."""
        value = self.program.value(node)
        if isinstance(value, Tensor):
            return tuple(value.shape)
        weight = self.program.weight(node)
        return tuple(weight.tensor.shape) if weight else None

    def dtype(self, node: Node) -> torch.dtype | None:
        """The dtype of a node's tensor; None where it is not known."""
        value = self.program.value(node)
        if isinstance(value, Tensor):
            return value.dtype
        weight = self.program.weight(node)
        return weight.tensor.dtype if weight else None

    def is_number(self, node: Node) -> bool:
        """Whether a node's value is one number: a size, or a float that Dynamo hands over as a symbol."""
        value = self.program.value(node)
        return isinstance(value, torch.SymInt | torch.SymFloat | int | float) and not isinstance(value, bool)

    def is_given(self, node: Node) -> bool:
        """Whether a number is known before anything is computed: made of the graph's inputs and other numbers alone."""
        above = dependencies(node)
        given = all(found.op == "placeholder" or self.is_number(found) for found in above)
        return given and self.effects.touched.isdisjoint(above)

    def same_shape(self, a: Node, b: Node) -> bool:
        """Whether two nodes are known to have one shape."""
        first, second = self.shape(a), self.shape(b)
        return first is not None and second is not None and same_sizes(first, second)

    def transparent(self, node: Node) -> Node | None:
        """The operand of a no-op or of a reshape that keeps the last dimension; None for any other node."""
        if not node.all_input_nodes:
            return None
        operand = node.all_input_nodes[0]
        return operand if self.rows(node) is self.rows(operand) else None

    def weight(self, node: Node) -> Weight | None:
        """The parameter that a node reads as a matrix, through no-ops, transposes and expansion over a batch.

        ``transposed`` is as seen from `node`: an [in, out] matrix that a ``x @ node`` multiplies with is the transpose
        of how a projection's weight is stored.
        """
        node = self.source(node)
        weight = self.program.weight(node)
        if weight is not None:
            return weight if weight.tensor.dim() == 2 else None
        kind = operation(node)
        if kind in TRANSPOSES and self._swaps_last_two(node):
            inner = self.weight(node.all_input_nodes[0])
            return replace(inner, transposed=not inner.transposed) if inner else None
        if kind in EXPANDS or kind in RESHAPES:
            inner = self.weight(node.all_input_nodes[0])
            shape = self.shape(node)
            if inner and shape and len(shape) > 2 and tuple(shape[-2:]) == tuple(inner.matrix.shape):
                return inner
        return None

    def is_weight_view(self, node: Node) -> bool:
        """Whether a node only shows a weight in another form."""
        return operation(node) in SHOWS_A_WEIGHT

    def _represent(self, node: Node) -> Node:
        if node in self.effects.touched:
            return node
        inner = self.no_op(node)
        if inner is not None and inner not in self.effects.touched:
            self._note_dropout(node)
            return self.source(inner)
        if not self.effects.touched.isdisjoint(node.all_input_nodes):
            return node  # read once before and once after a change, the same operation gives two values
        if operation(node) in RESHAPES and (collapsed := self._collapse(node)) is not None:
            return collapsed
        key = None if node in self.effects.changed else self._key(node)
        return node if key is None else self._first.setdefault(key, node)

    def _note_dropout(self, node: Node) -> None:
        if node.op == "call_module":
            module = self.program.attribute(str(node.target))
            if type(module) is nn.Dropout and module.p > 0:
                self.eval_only.add(str(node.target))

    def no_op(self, node: Node) -> Node | None:
        """The operand of a node that returns it unchanged, whatever becomes of either afterwards."""
        kind = operation(node)
        if node.op == "call_module":
            module = self.program.attribute(str(node.target))
            if type(module) is nn.Dropout and (not module.training or module.p == 0):
                return node.all_input_nodes[0]
            return node.all_input_nodes[0] if type(module) is nn.Identity else None
        if not node.all_input_nodes:
            return None
        operand = node.all_input_nodes[0]
        if kind in COPIES:
            return operand
        if kind in DROPOUTS:
            probability, training = _dropout_arguments(node)
            return operand if training is False or probability == 0 else None
        if kind in CASTS:
            before, after = self.program.value(operand), self.program.value(node)
            if isinstance(before, Tensor) and isinstance(after, Tensor):
                same = before.dtype == after.dtype and before.device == after.device
                return operand if same else None
            return operand if self._restates_dtype(node, operand) else None
        if kind in EXPANDS and self.same_shape(node, operand):
            return operand
        return None

    def _restates_dtype(self, node: Node, operand: Node) -> bool:
        """A graph without metadata: ``linear(…).to(torch.float32)`` where the linear's weight is float32."""
        wanted = node.args[1] if len(node.args) == 2 and not node.kwargs else None
        return isinstance(wanted, torch.dtype) and self._computed_dtype(operand) == wanted

    def _computed_dtype(self, node: Node) -> torch.dtype | None:
        node = self.source(node)
        if node.op == "call_module":
            module = self.program.attribute(str(node.target))
            return module.weight.dtype if type(module) is nn.Linear else None
        if operation(node) in (F.linear, torch.addmm) and isinstance(node.args[1], Node):
            weights = [self.program.weight(n) for n in node.all_input_nodes]
            known = {w.tensor.dtype for w in weights if w is not None}
            return known.pop() if len(known) == 1 else None
        if operation(node) in (operator.add, operator.mul, torch.add, torch.mul):
            found = {self._computed_dtype(n) for n in node.all_input_nodes}
            return found.pop() if len(found) == 1 else None
        return None

    def _collapse(self, node: Node) -> Node | None:
        """A reshape that leads back to a shape that is there already."""
        base = self.source(node.all_input_nodes[0])
        while operation(base) in RESHAPES and base not in self.effects.touched:
            if self.same_shape(base, node):
                return base
            base = self.source(base.all_input_nodes[0])
        return base if self.same_shape(base, node) and base is not node else None

    def _key(self, node: Node) -> Hashable | None:
        """Equal for nodes that compute the same from the same; None for those that may not be merged."""
        kind = operation(node)
        if isinstance(kind, OpOverload):
            # Somebody's own operator may draw numbers or keep a state without saying so.
            if kind._schema.is_mutable or kind.namespace not in TORCHS_OWN:
                return None
            if torch.Tag.nondeterministic_seeded in kind.tags or kind in DROPOUTS:
                return None
        elif kind is operator.getitem:
            if operation(node.all_input_nodes[0]) not in SIZES:
                return None
        elif kind not in MERGED:
            return None
        try:
            key = (kind, _freeze(node.args, self.source), _freeze(node.kwargs, self.source))
            hash(key)
        except TypeError:
            return None
        return key

    def _keeps_last(self, node: Node) -> bool:
        before, after = self.shape(node.all_input_nodes[0]), self.shape(node)
        if before is not None and after is not None:
            return bool(before) and bool(after) and same_sizes(before[-1:], after[-1:])
        if self.restores(node) is not None:
            (features,) = node.args[1].args[1]  # type: ignore[union-attr,misc]
            return self._out_features(node.all_input_nodes[0]) == features
        # Without shapes: x.view(-1, x.size(-1)), as transformers' Conv1D begins.
        sizes = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
        if len(sizes) != 2 or not isinstance(last := sizes[-1], Node):
            return False
        kind, operand = operation(last), self.source(node.all_input_nodes[0])
        if kind == "size" and last.args[1:] == (-1,):
            return self.source(last.all_input_nodes[0]) is operand
        if kind is operator.getitem and last.args[1] == -1:
            whole = last.all_input_nodes[0]
            return operation(whole) in SIZES and self.source(whole.all_input_nodes[0]) is operand
        return False

    def _out_features(self, node: Node) -> int | None:
        weight = self.weight(node.args[2]) if operation(node) is torch.addmm else None  # type: ignore[arg-type]
        return int(weight.matrix.shape[1]) if weight else None

    def restores(self, node: Node) -> Node | None:
        """x, for ``view(…, x.size()[:-1] + (features,))``, as transformers' Conv1D ends; None for anything else."""
        sizes = node.args[1] if operation(node) in RESHAPES and len(node.args) == 2 else None
        if not isinstance(sizes, Node) or operation(sizes) is not operator.add:
            return None
        leading, features = sizes.args
        if not isinstance(leading, Node) or not isinstance(features, tuple) or len(features) != 1:
            return None
        if operation(leading) is not operator.getitem or leading.args[1] != slice(None, -1, None):
            return None
        whole = leading.all_input_nodes[0]
        return self.source(whole.all_input_nodes[0]) if operation(whole) in SIZES and len(whole.args) == 1 else None

    def _swaps_last_two(self, node: Node) -> bool:
        kind, dims = operation(node), node.args[1:]
        if kind in ("T", "mT", "t", aten.t.default, aten.numpy_T.default, aten.mT.default, torch.t):
            return True
        if kind in (aten.permute.default, torch.permute, "permute"):
            order = dims[0] if dims and isinstance(dims[0], tuple | list) else dims
            return tuple(order) in ((1, 0), (-1, -2))
        return tuple(dims) in ((0, 1), (1, 0), (-1, -2), (-2, -1))


def _dropout_arguments(node: Node) -> tuple[Any, Any]:
    names = ("input", "p", "train" if node.target is not F.dropout else "training")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return given.get("p", 0.5), given.get(names[2], True)


def _freeze(value: Any, source: Callable[[Node], Node]) -> Hashable:
    if isinstance(value, Node):
        return source(value)
    if isinstance(value, tuple | list):
        return tuple(_freeze(v, source) for v in value)
    if isinstance(value, dict):
        return tuple((k, _freeze(v, source)) for k, v in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    return (type(value), value)
