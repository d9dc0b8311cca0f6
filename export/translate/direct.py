"""A decoder's fused program as an ONNX graph, written node by node: it is not traced again.

Every RMS norm is one node, and the addition in front of it a part of that node. No value is computed twice, and no
weight is transposed at run time but one that is read as it stands as well (a tied embedding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from flora_fx.storage.casting import is_cast_later, numbers
from flora_fx.storage.module import FusedExportedProgram
from flora_fx.storage.pack import assemble

from ..trace.capture import PREFIX
from ..trace.quantized_base import QuantizedBase
from ..trace.traced import Traced
from .nodes import Nodes, Weight
from .norms import Norm, find_norms
from .operators import OPERATORS, Unknown, Written, value_of
from .quantized_linear import write_quantized_linear

__all__ = ["OPSET", "Unknown", "write_graph"]

aten = torch.ops.aten

OPSET = 20
_IR_VERSION = 10


def write_graph(program: ExportedProgram, traced: Traced, base: QuantizedBase | None = None) -> ir.Model:
    """Write a program of target ``"decoder"``; its inputs and outputs get the names and axes of ``traced``.

    Weights are not copied: they are read from where they are when the graph is saved. Quantized ones are written as
    ``base`` says.

    Raises:
        Unknown: it has an operator that is not known here.
    """
    return _Graph(program, traced, base).model()


class _Graph:
    """One program, being written."""

    def __init__(self, program: ExportedProgram, traced: Traced, base: QuantizedBase | None) -> None:
        self.program = program
        self.base = base
        self.traced = traced
        self.graph = program.graph_module.graph
        self._values: dict[Node, Any] = {}
        self._weights = _weights(program)
        self._inputs = self._name_inputs()
        self._sizes = _sizes(self._inputs)
        self.nodes = Nodes(self._axes())
        self._norms = find_norms(self.graph)
        self._inner = {node for norm in self._norms.values() for node in norm.inner}
        self._sums = {norm.x: norm for norm in reversed([*self._norms.values()]) if _is_skip(norm)}

    def _name_inputs(self) -> dict[Node, str]:
        names = self.program.graph_signature.user_inputs
        found = {node.name: node for node in self.graph.find_nodes(op="placeholder")}
        return {found[str(name)]: given for name, given in zip(names, self.traced.inputs, strict=True)}

    def _axes(self) -> dict[str, str]:
        """Names of symbolic sizes, from the inputs that have them."""
        known: dict[str, str] = {}
        for node, name in self._inputs.items():
            for dim, axis in self.traced.axes.get(name, {}).items():
                known.setdefault(str(value_of(node).shape[dim]), axis)
        return known

    # What operators are written with

    def value(self, node: object) -> Any:
        """What a value of the program is in the graph: a value, or a tuple of them."""
        assert isinstance(node, Node)
        if node not in self._values:
            if node in self._weights:
                self._values[node] = self.nodes.weight(self._weights[node])
            else:
                self._values[node] = self._written(node)
        return self._values[node]

    def size(self, number: Any) -> ir.Value:
        """A symbolic size, [1], from an input that has it."""
        if (found := self._sizes.get(str(number))) is None:
            raise Unknown(f"a size that no input has: {number}")
        node, dim = found
        like = torch.empty(1, dtype=torch.int64, device="meta")
        return self.nodes.add("Shape", [self.value(node)], [like], start=dim, end=dim + 1)[0]

    def transposed(self, weight: object) -> ir.Value:
        """A matrix, transposed: when it is saved, where nobody reads it as it is."""
        assert isinstance(weight, Node)
        if weight in self._weights and all(_turns(user, weight) for user in weight.users):
            return self.nodes.turned(self._weights[weight])
        return self.nodes.add("Transpose", [self.value(weight)], [value_of(weight).t()], perm=[1, 0])[0]

    def weight(self, node: object) -> Weight:
        """The weight that a placeholder is."""
        if not isinstance(node, Node) or node not in self._weights:
            raise Unknown(f"{node} in the place of a weight")
        return self._weights[node]

    # Node by node

    def _written(self, node: Node) -> Written:
        if node in self._norms:
            return self._norm(self._norms[node])
        if node in self._sums:
            return self._skip(self._sums[node])
        if node.target is torch.ops.flora_fx.quantized_linear.default and self.base is not None:
            return write_quantized_linear(self, node, self.weight, self.base)
        write = OPERATORS.get(node.target)
        if write is None:
            raise Unknown(str(node.target))
        return write(self, node)

    def _norm(self, norm: Norm) -> ir.Value:
        if self._sums.get(norm.x) is norm:
            self.value(norm.x)  # which is written with its norm
            return self._values[norm.end]
        return self.nodes.add(
            "SimplifiedLayerNormalization",
            [self.value(norm.x), self.value(norm.scale)],
            [value_of(norm.end)],
            axis=-1,
            epsilon=norm.epsilon,
            stash_type=int(from_torch_dtype(norm.precision)),
        )[0]

    def _skip(self, norm: Norm) -> ir.Value:
        """A sum, and its norm, by one node."""
        skip, x = norm.x.args[:2]
        like = [value_of(norm.end), None, None, value_of(norm.x)]
        values = [self.value(x), self.value(skip), self.value(norm.scale)]
        normed, _, _, total = self.nodes.add(
            "SkipSimplifiedLayerNormalization", values, like, domain="com.microsoft", epsilon=norm.epsilon
        )
        self._values[norm.end] = normed
        return total

    def model(self) -> ir.Model:
        """Write all of it."""
        inputs = []
        for node, name in self._inputs.items():
            kind = ir.TensorType(from_torch_dtype(value_of(node).dtype))
            self._values[node] = ir.Value(name=name, type=kind, shape=self._shape(name, value_of(node)))
            inputs.append(self._values[node])
        for node in self._order():
            if node not in self._values:
                self._values[node] = self._written(node)
        (returned,) = self.graph.output_node().args
        outputs = []
        for node, name in zip(returned, self.traced.outputs, strict=True):
            value = self.value(node)
            if value.producer() is None or value in outputs:
                raise Unknown(f"the output {name} is an input, or another output")
            value.name, value.shape = name, self._shape(name, value_of(node))
            outputs.append(value)
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=_needed(self.nodes.nodes, outputs),
            initializers=[value for value in self.nodes.initializers if value.uses()],
            opset_imports={"": OPSET, "com.microsoft": 1},
            name="main_graph",
        )
        return ir.Model(graph, ir_version=_IR_VERSION, producer_name="flora_fx")

    def _order(self) -> Iterator[Node]:
        """The nodes that are written: neither numbers nor the insides of norms."""
        for node in self.graph.nodes:
            if node.op != "call_function" or not node.users or isinstance(node.meta.get("val"), _NUMBERS):
                continue
            if node not in self._inner or node in self._norms:
                yield node

    def _shape(self, name: str, like: Tensor) -> ir.Shape:
        axes = self.traced.axes.get(name, {})
        sizes = [axes.get(dim, size if isinstance(size, int) else None) for dim, size in enumerate(like.shape)]
        return ir.Shape(sizes)


_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool, type(None))


def _weights(program: ExportedProgram) -> dict[Node, Weight]:
    """The weights, by their placeholders."""
    lifted = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.kind in lifted}
    found = {}
    for node in program.graph_module.graph.find_nodes(op="placeholder"):
        if (target := targets.get(node.name)) is None:
            continue
        tensor = program.state_dict.get(target, program.constants.get(target))
        if isinstance(tensor, Tensor):
            found[node] = _weight(program, target, tensor)
    return found


def _weight(program: ExportedProgram, target: str, tensor: Tensor) -> Weight:
    name = target.removeprefix(PREFIX)
    if is_cast_later(tensor):
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return Weight(name, like, partial(numbers, tensor))
    return Weight(name, tensor, _maker(program, target))


def _maker(program: ExportedProgram, target: str) -> Callable[[], Tensor] | None:
    """What makes a weight that is a pack, where packs are not stored."""
    if not isinstance(program, FusedExportedProgram) or not program.state_dict.get(target, torch.empty(0)).is_meta:
        return None
    pack = program.packs().get(target)
    return None if pack is None else partial(assemble, pack, program.resolve)


def _sizes(inputs: dict[Node, str]) -> dict[str, tuple[Node, int]]:
    """An input to see each symbolic size at: the mask before the tokens before the caches, as torch.export has it."""
    found: dict[str, tuple[Node, int]] = {}
    tokens, mask, *caches = inputs
    for node in (*caches, tokens, mask):
        for dim, size in enumerate(value_of(node).shape):
            found[str(size)] = (node, dim)
    return found


def _is_skip(norm: Norm) -> bool:
    """Whether what is normed is a sum that ONNX Runtime adds up in the same kernel."""
    total = norm.x
    if total.target is not aten.add.Tensor or total.kwargs or norm.precision != torch.float32:
        return False
    operands = total.args[:2]
    return all(
        isinstance(operand, Node)
        and isinstance(value := operand.meta.get("val"), Tensor)
        and value.dim() == 3
        and value.dtype == value_of(total).dtype == value_of(norm.end).dtype
        and [*map(str, value.shape)] == [*map(str, value_of(total).shape)]
        for operand in operands
    )


def _turns(user: Node, weight: Node) -> bool:
    """Whether a reader of a weight reads it transposed."""
    return user.target is aten.linear.default and user.args[1] is weight and value_of(user.args[0]).dim() > 2


def _needed(nodes: list[ir.Node], outputs: list[ir.Value]) -> list[ir.Node]:
    """The nodes that an output is computed from."""
    wanted = set(outputs)
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            kept.append(node)
            wanted.update(value for value in node.inputs if value is not None)
        else:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)
    return kept[::-1]
