"""A program with few layers written out as the program with all of them.

    short     before   layer 0   layer 1   layer 2             after
    full      before   layer 0   layer 1   layer 2   layer 1   layer 2   …   after

Whoever asks for this has seen that the layers compute alike, see `observing`; what a program does not show to be a row
of layers is refused here once more.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument
from torch.fx import Graph, Node

from flora_fx.internals import pytree

from .observing import Tangled

__all__ = ["repeat_layers"]


def repeat_layers(
    short: ExportedProgram, module: nn.Module, args: tuple[Any, ...], path: str, order: Sequence[int]
) -> ExportedProgram:
    """Write out a program.

    Args:
        short: of a module with fewer layers; returns its logits, then two tensors a layer.
        module: with all layers.
        args: of it: tensors, and at last a tuple of two tensors a layer.
        path: where the layers are, in both.
        order: for each layer of ``module``, the one of ``short`` that computes alike. The first is layer 0, which is
            so no other one.

    Returns:
        the program that a capture of ``module`` gives, but for the names of its values.

    Raises:
        Tangled: its layers are not one behind the other.
    """
    return _Repetition(short, module, path, order).program(args)


aten = torch.ops.aten


@dataclass
class _Layer:
    """A layer of the short program: its nodes, and the one that others read."""

    nodes: list[Node]
    end: Node | None = None


class _Repetition:
    def __init__(self, short: ExportedProgram, module: nn.Module, path: str, order: Sequence[int]) -> None:
        self.short = short
        self.module = module
        self.path = path
        self.order = order
        self.graph = Graph()
        self.layers = [_Layer([]) for _ in range(max(order) + 1)]
        self.first: list[Node] = []
        self.after: list[Node] = []
        self._index = re.compile(rf"{re.escape(path)}\.(\d+)(?=\.|$)")
        self._region: dict[Node, int | None] = {}
        self._copies: dict[Node, Node] = {}
        self._weights: dict[tuple[Node, int], Node] = {}
        self._pairs: dict[tuple[Node, int], Node] = {}
        self._inputs: list[InputSpec] = []
        self._divide()

    # --- the short program in parts

    def _divide(self) -> None:
        """Which node is of which layer; those that are of none stand before the layers or after them."""
        made_by_layers: set[Node] = set()
        for node in self.short.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            reads = made_by_layers.intersection(node.all_input_nodes)
            is_tensor = isinstance(node.meta.get("val"), Tensor | tuple | list)
            region = self._layer_of(node) if is_tensor or reads else None
            self._region[node] = region
            if region is None:
                (self.after if reads else self.first).append(node)
            elif region == 0:
                self.first.append(node)
            else:
                self.layers[region].nodes.append(node)
            if region is not None or reads:
                made_by_layers.add(node)
        for node in self._region:
            self._note_ends(node)

    def _layer_of(self, node: Node) -> int | None:
        for name, _ in reversed([*node.meta.get("nn_module_stack", {}).values()]):
            if found := self._index.fullmatch(name) or self._index.match(name):
                return int(found[1])
        return None

    def _source(self, node: Node) -> Node:
        """What a value is: a trace that casts to the dtype that is there takes the cast for the value from then on."""
        while node.target is aten.to.dtype and _alike(node, source := node.all_input_nodes[0]):
            node = source
        return node

    def _note_ends(self, node: Node) -> None:
        region = self._region[node]
        last = len(self.layers) - 1
        for operand in map(self._source, node.all_input_nodes):
            origin = self._region.get(operand)
            if origin is None or origin == region:
                continue
            wanted = last if region is None else region - 1
            layer = self.layers[origin]
            if origin != wanted or layer.end not in (None, operand):
                raise Tangled("a layer hands on more than one value")
            layer.end = operand

    # --- the full one

    def program(self, args: tuple[Any, ...]) -> ExportedProgram:
        self._placeholders()
        for node in self.first:
            self._copies[node] = self.graph.node_copy(node, self._copies.__getitem__)
        ends: list[list[Node]] = [self._returned(0, 0, self._copies)]
        end = self._end(0, self._copies)
        for index, kind in enumerate(self.order):
            if index == 0:
                continue
            here: dict[Node, Node] = {}
            before = self.layers[kind - 1].end
            assert before is not None
            for node in self.layers[kind].nodes:
                here[node] = self._repeated(node, here, index, kind, {before: end})
            end = self._end(kind, here)
            ends.append(self._returned(kind, index, here))
        last = self.layers[-1].end
        assert last is not None
        self._copies[last] = end
        for node in self.after:
            self._copies[node] = self.graph.node_copy(node, self._copies.__getitem__)
        logits = self.short.graph.output_node().args[0][0]
        returned = [self._copies[logits], *(value for pair in ends for value in pair)]
        self.graph.output(tuple(returned))
        self.graph.lint()
        return self._finished(args, returned)

    def _end(self, kind: int, here: dict[Node, Node]) -> Node:
        end = self.layers[kind].end
        if end is None:
            raise Tangled("a layer hands on nothing")
        return here[end]

    def _returned(self, kind: int, index: int, here: dict[Node, Node]) -> list[Node]:
        """What the program returns of a layer."""
        values = self.short.graph.output_node().args[0][1 + 2 * kind : 3 + 2 * kind]
        return [here[value] for value in values]

    def _repeated(self, node: Node, here: dict[Node, Node], index: int, kind: int, stream: dict[Node, Node]) -> Node:
        def found(operand: Node) -> Node:
            operand = operand if operand in here else self._source(operand)
            for known in (here, stream):
                if operand in known:
                    return known[operand]
            for placeholders in (self._weights, self._pairs):
                if (operand, index) in placeholders:
                    return placeholders[operand, index]
            return self._copies[operand]

        new = self.graph.node_copy(node, found)
        if "nn_module_stack" in new.meta:
            new.meta["nn_module_stack"] = {
                self._moved(key, index): (self._moved(name, index), kind_)
                for key, (name, kind_) in new.meta["nn_module_stack"].items()
            }
        return new

    def _moved(self, name: str, index: int) -> str:
        return self._index.sub(f"{self.path}.{index}", name, count=1)

    # --- its inputs

    def _placeholders(self) -> None:
        nodes = {node.name: node for node in self.short.graph.find_nodes(op="placeholder")}
        specs = [(spec, nodes[spec.arg.name]) for spec in self.short.graph_signature.input_specs]
        of_layers: dict[tuple[InputKind, int], list[tuple[InputSpec, Node]]] = {}
        for spec, node in specs:
            if (layer := self._layer_of_weight(spec)) is not None:
                of_layers.setdefault((spec.kind, layer), []).append((spec, node))
        written: set[InputKind] = set()
        user = [node for spec, node in specs if spec.kind is InputKind.USER_INPUT]
        pairs = user[-2 * len(self.layers) :]
        for spec, node in specs:
            layer = self._layer_of_weight(spec)
            if layer is not None:
                if spec.kind not in written:
                    written.add(spec.kind)
                    for index, kind in enumerate(self.order):
                        for own, placeholder in of_layers.get((spec.kind, kind), ()):
                            self._weight(own, placeholder, index)
            elif node is pairs[0]:
                for index, kind in enumerate(self.order):
                    for which in (0, 1):
                        self._pair(spec, pairs[2 * kind + which], 2 * index + which)
            elif node not in pairs:
                self._copies[node] = self._placeholder(spec, node, node.name)

    def _layer_of_weight(self, spec: InputSpec) -> int | None:
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER) or spec.target is None:
            return None  # constants are equal in layers that are alike
        found = self._index.match(spec.target)
        return int(found[1]) if found else None

    def _weight(self, spec: InputSpec, node: Node, index: int) -> None:
        assert spec.target is not None
        flat = self.path.replace(".", "_")
        name = re.sub(rf"(?<={re.escape(flat.lower())}_)\d+(?=_|$)", str(index), node.name, count=1)
        self._weights[node, index] = self._placeholder(
            replace(spec, target=self._moved(spec.target, index)), node, name
        )
        self._copies.setdefault(node, self._weights[node, index])

    def _pair(self, spec: InputSpec, node: Node, number: int) -> None:
        name = re.sub(r"\d+$", str(number), node.name)
        self._pairs[node, number // 2] = self._placeholder(spec, node, name)
        self._copies.setdefault(node, self._pairs[node, number // 2])

    def _placeholder(self, spec: InputSpec, node: Node, name: str) -> Node:
        new = self.graph.placeholder(name)
        new.meta = copy.copy(node.meta)
        new.type = None
        self._inputs.append(replace(spec, arg=replace(spec.arg, name=new.name)))
        return new

    # --- as torch.export has it

    def _finished(self, args: tuple[Any, ...], returned: list[Node]) -> ExportedProgram:
        short, module = self.short, self.module
        kind = short.graph_signature.output_specs[0].kind
        outputs = [OutputSpec(kind, TensorArgument(name=node.name), None) for node in returned]
        buffers = dict(module.named_buffers(remove_duplicate=False))
        constants = {
            spec.target: buffers[spec.target]
            for spec in self._inputs
            if spec.kind is InputKind.BUFFER and not spec.persistent and spec.target in buffers
        }
        root = short.module_call_graph[0]
        assert root.signature is not None
        taken = [spec.arg for spec in self._inputs if spec.kind is InputKind.USER_INPUT]
        signature = ModuleCallSignature(
            inputs=taken,
            outputs=[],  # torch looks for their names in what it decomposes this to, where layers' copies have others
            in_spec=pytree.tree_structure((args, {})),
            out_spec=pytree.tree_structure(tuple(returned)),
            forward_arg_names=root.signature.forward_arg_names,
        )
        return ExportedProgram(
            short.graph_module,
            self.graph,
            ExportGraphSignature(self._inputs, outputs),
            module.state_dict(keep_vars=True),
            short.range_constraints,
            [ModuleCallEntry("", signature)],
            (args, {}),
            {**short.constants, **constants},
            verifiers=short.verifiers,
        )


def _alike(one: Node, other: Node) -> bool:
    values = one.meta["val"], other.meta["val"]
    return all(isinstance(value, Tensor) for value in values) and values[0].dtype == values[1].dtype
