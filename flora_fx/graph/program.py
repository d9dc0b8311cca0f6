"""One view of the kinds of graph that torch has: who the weights are, what is known of nodes, how it is finished.

from                        weights are                                     new operations are
symbolic_trace, .module()   get_attr nodes, or inside called modules        torch functions
Dynamo                      placeholders; their values in node.meta         torch functions
torch.export                placeholders listed in graph_signature          ATen operators

New nodes are added by the program's `Builder`; nodes that read weights are added here, where it is known how.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Node

from flora_fx.ir import Derived, Pack, Weight
from flora_fx.storage.module import META, PLAIN, STORE, FusedExportedProgram, FusedGraphModule, Fusion
from flora_fx.storage.pack import derive

from .builder import Builder, Dialect, ExportedBuilder
from .examples import Examples, SharedExamples, same_sizes

__all__ = ["ExportedProgramView", "GraphModuleView", "Program", "open_program"]

aten = torch.ops.aten


class Program(ABC):
    """A private copy of a graph, and what is known of its nodes."""

    graph: fx.Graph
    root: fx.GraphModule
    examples: Examples
    build: Builder
    """Adds nodes to the graph."""
    derives: bool = True
    """Whether values that are derived from weights can be stored."""
    copies: bool = True
    """Whether copies of weights, scaled or cast, can be stored."""
    settles: bool = False
    """Whether the graph runs op by op, and its values' dtypes follow from those of its inputs and weights."""

    @abstractmethod
    def weight(self, node: Node) -> Weight | None:
        """The parameter, buffer or constant that a node reads; None if the node computes its value."""

    @abstractmethod
    def read_pack(self, pack: Pack, like: Tensor) -> Node:
        """Add a node that reads a pack with the dtype and device of ``like``."""

    @abstractmethod
    def read_derived(self, derived: Derived, like: Tensor) -> Node:
        """Add a node that reads a derived value with the dtype and device of ``like``."""

    @abstractmethod
    def trains(self, weights: Iterable[Weight]) -> bool:
        """Whether gradients of any of these weights are wanted, and this kind of graph can give them."""

    @abstractmethod
    def read_weight(self, weight: Weight) -> Node:
        """A node, a new one if need be, that reads a parameter, also one that was hidden in a called module."""

    @abstractmethod
    def finish(self, fusion: Fusion) -> fx.GraphModule | ExportedProgram:
        """The rewritten program, of the kind that was opened."""

    def value(self, node: Node) -> Any:
        """The example (fake) value of a node, or None."""
        return self.examples.value(node)

    def shape(self, node: Node) -> tuple[Any, ...] | None:
        """The shape of a node's tensor; None where it is not known."""
        value = self.value(node)
        if isinstance(value, Tensor):
            return tuple(value.shape)
        weight = self.weight(node)
        return tuple(weight.tensor.shape) if weight else None

    def dtype(self, node: Node) -> torch.dtype | None:
        """The dtype of a node's tensor; None where it is not known."""
        value = self.value(node)
        if isinstance(value, Tensor):
            return value.dtype
        weight = self.weight(node)
        return weight.tensor.dtype if weight else None

    def same_shape(self, a: Node, b: Node) -> bool:
        """Whether two nodes are known to have one shape."""
        first, second = self.shape(a), self.shape(b)
        return first is not None and second is not None and same_sizes(first, second)

    def is_number(self, node: Node) -> bool:
        """Whether a node's value is one number: a size, or a float that Dynamo hands over as a symbol."""
        value = self.value(node)
        return isinstance(value, torch.SymInt | torch.SymFloat | int | float) and not isinstance(value, bool)

    def rename(self, node: Node, name: str) -> None:
        """Give a node a name, with a number behind it where another node has it: for readers of the graph."""
        node._rename(name)

    def attribute(self, fqn: str) -> Any:
        """What stands under a fully qualified name; None if nothing does."""
        found: Any = self.root
        for part in fqn.split("."):
            found = getattr(found, part, None)
        return found


class GraphModuleView(Program):
    """`torch.fx.symbolic_trace`, `ExportedProgram.module()` and Dynamo."""

    def __init__(self, root: fx.GraphModule) -> None:
        self.root = root
        self.graph = _copy_graph(root.graph)
        inputs = self.graph.find_nodes(op="placeholder")
        self._inputs = {node: index for index, node in enumerate(inputs)}
        dynamo = any("example_value" in node.meta for node in inputs)
        self.examples = Examples(self.graph, "example_value" if dynamo else "val")
        self.build = Builder(self.graph, self.examples, Dialect())
        self.settles = bool(root.meta.get(PLAIN)) and self._is_as_captured()

    def _is_as_captured(self) -> bool:
        """Whether every weight is still of the dtype and on the device that the graph says."""
        read = [(self.value(n), self.attribute(str(n.target))) for n in self.graph.find_nodes(op="get_attr")]
        weights = [(value, found) for value, found in read if isinstance(found, Tensor)]
        return all(isinstance(v, Tensor) and (v.dtype, v.device) == (w.dtype, w.device) for v, w in weights)

    def weight(self, node: Node) -> Weight | None:
        if node.op == "get_attr":
            tensor = self.attribute(str(node.target))
            return Weight(str(node.target), tensor, node) if isinstance(tensor, Tensor) else None
        if node.op == "placeholder":
            # Dynamo leaves the real Parameter here while its backend runs (seen in torch 2.11 to 2.13).
            tensor = getattr(node.meta.get("grapharg"), "example", None)
            if isinstance(tensor, nn.Parameter):
                manager = "FSDP" if _is_gathered(node) else ""
                return Weight(self._inputs[node], tensor, node, label=_qualified_name(node), manager=manager)
        return None

    def read_pack(self, pack: Pack, like: Tensor) -> Node:
        return self._stored(pack.name, pack.shape, like)

    def read_derived(self, derived: Derived, like: Tensor) -> Node:
        return self._stored(derived.name, derived.shape, like)

    def _stored(self, name: str, shape: tuple[int, ...], like: Tensor) -> Node:
        # The attribute itself comes with `finish`.
        node = self.graph.create_node("get_attr", f"{STORE}.{name}", name=f"{STORE}_{name}")
        if (example := self.examples.like(shape, like)) is not None:
            self.examples.give(node, example)
        return node

    def trains(self, weights: Iterable[Weight]) -> bool:
        return any(weight.tensor.requires_grad for weight in weights)

    def read_weight(self, weight: Weight) -> Node:
        if isinstance(weight.source, int):
            assert weight.node is not None
            return weight.node
        # A node of its own: the one there is may stand further down.
        node = self.graph.create_node("get_attr", weight.source)
        if (example := self.examples.like(tuple(weight.tensor.shape), weight.tensor)) is not None:
            self.examples.give(node, example)
        return node

    def finish(self, fusion: Fusion) -> fx.GraphModule:
        module = FusedGraphModule.of(self.root, self.graph, fusion)
        module.graph.lint()
        module.retie()
        return module


_ATEN = Dialect(
    aten.linear.default,
    aten.split_with_sizes.default,
    aten.reshape.default,
    aten.t.default,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.cat.default,
)


class ExportedProgramView(Program):
    """`torch.export.export`, before or after decompositions."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.root = program.graph_module
        self.graph = _copy_graph(program.graph)
        self.examples = SharedExamples(self.graph)
        self.build = ExportedBuilder(self.graph, self.examples, _ATEN)
        signature = program.graph_signature
        self._inputs = list(signature.input_specs)
        self._outputs = list(signature.output_specs)
        lifted = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        self._targets = {
            spec.arg.name: spec.target for spec in self._inputs if spec.kind in lifted and spec.target is not None
        }
        self._packs: dict[str, Pack] = {}
        self._derived: dict[str, Derived] = {}

    def weight(self, node: Node) -> Weight | None:
        if node.op != "placeholder" or node.name not in self._targets:
            return None
        fqn = self._targets[node.name]
        tensor = self.program.state_dict.get(fqn, self.program.constants.get(fqn))
        return Weight(fqn, tensor, node) if isinstance(tensor, Tensor) else None

    def read_pack(self, pack: Pack, like: Tensor) -> Node:
        self._packs[f"{STORE}.{pack.name}"] = pack
        return self._stored(pack.name, pack.shape, like, persistent=True)

    def read_derived(self, derived: Derived, like: Tensor) -> Node:
        self._derived[f"{STORE}.{derived.name}"] = derived
        return self._stored(derived.name, derived.shape, like, persistent=False)

    def _stored(self, name: str, shape: tuple[int, ...], like: Tensor, *, persistent: bool) -> Node:
        # A new lifted buffer: a placeholder and an input spec, both in front of the user's inputs.
        kinds = [spec.kind for spec in self._inputs]
        index = kinds.index(InputKind.USER_INPUT) if InputKind.USER_INPUT in kinds else len(kinds)
        first = self.graph.find_nodes(op="placeholder")[index : index + 1]
        before = first[0] if first else next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(before):
            node = self.graph.placeholder(f"b_{STORE}_{name}")
        node.meta["val"] = self.examples.like(shape, like)
        spec = InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), f"{STORE}.{name}", persistent=persistent)
        self._inputs.insert(index, spec)
        return node

    def trains(self, weights: Iterable[Weight]) -> bool:
        return False  # its operators are ATen's; `module()` of the program it was made from is what trains

    def read_weight(self, weight: Weight) -> Node:
        assert weight.node is not None  # an exported program calls no modules
        return weight.node

    def finish(self, fusion: Fusion) -> ExportedProgram:
        return self.unstored(fusion).store()

    def unstored(self, fusion: Fusion) -> FusedExportedProgram:
        """The rewritten program without its packs, which `FusedExportedProgram.store` makes."""
        returned = self.graph.output_node().args[0]
        assert isinstance(returned, tuple | list)
        outputs = [
            replace(spec, arg=replace(spec.arg, name=node.name)) if isinstance(node, Node) else spec
            for spec, node in zip(self._outputs, returned, strict=True)
        ]

        def resolve(source: str | int) -> Tensor:
            found = self.program.state_dict.get(str(source), self.program.constants.get(str(source)))
            assert isinstance(found, Tensor)
            return found

        packs = {
            target: torch.empty(pack.shape, dtype=resolve(pack.like).dtype, device="meta")
            for target, pack in self._packs.items()
        }
        derived = {target: derive(value, resolve) for target, value in self._derived.items()}
        result = FusedExportedProgram(
            self.root,
            self.graph,
            ExportGraphSignature(self._inputs, outputs),
            {**self.program.state_dict, **packs},
            self.program.range_constraints,
            [copy.copy(entry) for entry in self.program.module_call_graph],
            self.program.example_inputs,
            {**self.program.constants, **derived},
            verifiers=self.program.verifiers,
        )
        result.graph_module.meta[META] = fusion
        return result


def _qualified_name(node: Node) -> str:
    """``layers.0.weight`` for an input that Dynamo found at ``L['self']._modules['layers']._modules['0']…``."""
    parts = re.findall(r"\._(?:modules|parameters)\['([^']+)'\]", _source(node, "name") or "")
    return ".".join(parts) or node.name


def _is_gathered(node: Node) -> bool:
    """Whether an input is a parameter of a module that FSDP shards."""
    found = _source(node, "guard_source")
    return found is not None and bool(found.is_fsdp_module())


def _source(node: Node, attribute: str) -> Any:
    """What Dynamo knows of where an input came from (a property in torch 2.13, a method before); None for nothing."""
    found = getattr(getattr(node, "_dynamo_source", None), attribute, None)
    return found() if callable(found) else found


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same names, metadata and calling convention."""
    result = fx.Graph(owning_module=graph.owning_module, tracer_cls=graph._tracer_cls)
    mapping: dict[Node, Node] = {}
    returned = result.graph_copy(graph, mapping)
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        if new.name != old.name:  # inputs named like builtins ("input"); an export signature knows them by name
            new.name = old.name
    result.output(returned).meta = copy.copy(graph.output_node().meta)
    result.set_codegen(copy.copy(graph._codegen))
    for node in result.find_nodes(op="placeholder"):
        if isinstance(node.type, str):
            node.type = None  # an annotation kept as text: GraphModule cannot be pickled with it (torch 2.13)
    return result


def open_program(graph: object) -> Program:
    """A private view of a graph for the passes to work on.

    Raises:
        TypeError: not a graph.
    """
    if isinstance(graph, ExportedProgram):
        return ExportedProgramView(graph)
    if isinstance(graph, fx.GraphModule):
        return GraphModuleView(graph)
    kind = f"{type(graph).__module__}.{type(graph).__qualname__}"
    remedy = (
        "Capture the model first: flora_fx.fuse(flora_fx.capture(model, *example_inputs))."
        if isinstance(graph, nn.Module)
        else "Give it what torch.fx.symbolic_trace, torch.export.export or flora_fx.capture return."
    )
    raise TypeError(f"fuse needs a torch.fx.GraphModule or torch.export.ExportedProgram, not {kind}. {remedy}")
