"""One view of the kinds of graph that torch has: who the weights are, how nodes are added, how it is finished.

from                        weights are                                     new operations are
symbolic_trace, .module()   get_attr nodes, or inside called modules        torch functions
Dynamo                      placeholders; their values in node.meta         torch functions
torch.export                placeholders listed in graph_signature          ATen operators
"""

from __future__ import annotations

import copy
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Node

from flora_fx.internals import FakeTensor, FakeTensorMode, enable_python_dispatcher, statically_known_true
from flora_fx.ir import Derived, Pack, Weight
from flora_fx.ops import accumulate, accumulate_unrolled
from flora_fx.storage.module import META, STORE, FusedExportedProgram, FusedGraphModule, Fusion
from flora_fx.storage.pack import derive, tie

__all__ = ["ExportedProgramView", "GraphModuleView", "Program", "open_program", "same_sizes"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Dialect:
    """The functions that new nodes call."""

    linear: Any = F.linear
    split: Any = torch.split
    reshape: Any = torch.reshape
    transpose: Any = torch.t
    mul: Any = operator.mul
    div: Any = operator.truediv
    add: Any = operator.add
    cat: Any = torch.cat


class Program(ABC):
    """A private copy of a graph, its weights by node, and a dialect to write new nodes in."""

    graph: fx.Graph
    root: fx.GraphModule
    values_key: str = "val"
    origin: Node | None = None
    """The node that is being rewritten: new nodes take over where it came from."""
    derives: bool = True
    """Whether values that are derived from weights can be stored."""
    copies: bool = True
    """Whether copies of weights, scaled or cast, can be stored."""

    @abstractmethod
    def weight(self, node: Node) -> Weight | None:
        """The parameter, buffer or constant that a node reads; None if the node computes its value."""

    @abstractmethod
    def packed_weight(self, pack: Pack, like: Tensor) -> Node:
        """A node that reads a pack with the dtype and device of ``like``."""

    @abstractmethod
    def derived_value(self, derived: Derived, like: Tensor) -> Node:
        """A node that reads a derived value with the dtype and device of ``like``."""

    @abstractmethod
    def trains(self, weights: Iterable[Weight]) -> bool:
        """Whether gradients of any of these weights are wanted, and this kind of graph can give them."""

    @abstractmethod
    def weight_node(self, weight: Weight) -> Node:
        """A node that reads a parameter, also one that was hidden in a called module."""

    @abstractmethod
    def finish(self, fusion: Fusion) -> fx.GraphModule | ExportedProgram:
        """The rewritten program, of the kind that was opened."""

    # The dialect. Every method adds one node (or a few) at the graph's insertion point and gives it metadata.

    ops: Dialect

    def linear(self, x: Node, weight: Node, bias: Node | None) -> Node:
        """``x @ weightᵀ + bias``."""
        return self.call(self.ops.linear, x, weight, *(() if bias is None else (bias,)))

    def slices(self, x: Node, width: int, ranges: Sequence[tuple[int, int]]) -> list[Node]:
        """Ranges of the last dimension (of size ``width``): one split where they tile it, one slice each elsewhere."""
        if list(ranges) == [(0, width)]:
            return [x]
        edges = [start for start, _ in ranges] + [width]
        if edges[0] == 0 and all(stop == edges[i + 1] for i, (_, stop) in enumerate(ranges)):
            parts = self.call(self.ops.split, x, [stop - start for start, stop in ranges], -1)
            return [self.call(operator.getitem, parts, index) for index in range(len(ranges))]
        return [
            x if (start, stop) == (0, width) else self.call(aten.slice.Tensor, x, -1, start, stop)
            for start, stop in ranges
        ]

    def shaped_rows(self, x: Node, like: Node, features: int) -> Node:
        """``x`` with the leading dimensions of ``like`` and ``features`` at the end."""
        value = self.value(like)
        if value is None:
            leading = self.call(operator.getitem, self.call(getattr, like, "shape"), slice(None, -1))
            return self.call(self.ops.reshape, x, self.call(operator.add, leading, (features,)))
        if value.dim() == 2:
            return self.call(self.ops.reshape, x, [-1, features])
        return self.call(self.ops.reshape, x, [*self.sizes(like)[:-1], features])

    def shaped_like(self, x: Node, like: Node) -> Node:
        """``x`` in the shape of ``like``, which has as many rows."""
        found, wanted = self.value(x), self.value(like)
        if found is None or wanted is None or same_sizes(found.shape, wanted.shape):
            return x
        return self.call(self.ops.reshape, x, self.sizes(like))

    def sizes(self, x: Node) -> list[int | Node]:
        """The sizes of a node: numbers where they are fixed, nodes where they are dynamic."""
        return [
            size if isinstance(size, int) else self.call(aten.sym_size.int, x, dim)
            for dim, size in enumerate(self.value(x).shape)
        ]

    def widened(self, x: Node, others: Sequence[Node], weight: Node, bias: Node | None) -> Node:
        """``[x, others…] @ weightᵀ + bias``, of values in one shape but for the last dimension."""
        return self.linear(self.call(self.ops.cat, [x, *others], -1), weight, bias)

    def shaped_beside(self, x: Node, like: Node, features: int) -> Node:
        """``x``, with ``features`` at the end, in the leading dimensions of ``like``."""
        found, wanted = self.value(x), self.value(like)
        if found is None or wanted is None or same_sizes(found.shape[:-1], wanted.shape[:-1]):
            return x
        return self.shaped_rows(x, like, features)

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

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add a node with metadata computed from its arguments'."""
        node = self.graph.call_function(target, args, kwargs)
        if self.origin is not None:
            node.meta = {key: self.origin.meta[key] for key in _PROVENANCE if key in self.origin.meta}
        self.annotate(node)
        return node

    def rename(self, node: Node, name: str) -> None:
        """Give a node a name for whoever prints the graph; a number is appended where it is taken."""
        node._rename(name)

    def value(self, node: Node) -> Any:
        """The example (fake) value of a node, or None."""
        return node.meta.get("val", node.meta.get("example_value"))

    def annotate(self, node: Node) -> None:
        """Give a new node the example value that its neighbours have."""
        examples = [self.value(n) for n in node.all_input_nodes]
        mode = self.fake_mode
        if mode is None or any(example is None for example in examples):
            return
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        # Without Python's dispatcher a composite operator (linear, reshape) decomposes in C++, which asks a tensor of
        # symbolic sizes for numbers (torch 2.11); torch.export traces under it, too.
        with mode, torch.no_grad(), enable_python_dispatcher():
            function: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
            rest = args[1:] if node.op == "call_method" else args
            node.meta[self.values_key] = function(*rest, **kwargs)

    @cached_property
    def fake_mode(self) -> FakeTensorMode | None:
        """The mode that the graph's example values were made in; None for a graph without."""
        values = (self.value(node) for node in self.graph.nodes)
        return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)

    def fake(self, shape: Sequence[int], like: Tensor) -> Tensor | None:
        """An example value for a new weight."""
        if self.fake_mode is None:
            return None
        with self.fake_mode:
            return torch.empty(shape, dtype=like.dtype, device=like.device)

    def attribute(self, fqn: str) -> Any:
        """What stands under a fully qualified name; None if nothing does."""
        found: Any = self.root
        for part in fqn.split("."):
            found = getattr(found, part, None)
        return found


class GraphModuleView(Program):
    """`torch.fx.symbolic_trace`, `ExportedProgram.module()` and Dynamo."""

    ops = Dialect()

    def __init__(self, root: fx.GraphModule) -> None:
        self.root = root
        self.graph = _copy_graph(root.graph)
        inputs = self.graph.find_nodes(op="placeholder")
        self._inputs = {node: index for index, node in enumerate(inputs)}
        if any("example_value" in node.meta for node in inputs):
            self.values_key = "example_value"

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

    def packed_weight(self, pack: Pack, like: Tensor) -> Node:
        return self._stored(pack.name, pack.shape, like)

    def derived_value(self, derived: Derived, like: Tensor) -> Node:
        return self._stored(derived.name, derived.shape, like)

    def _stored(self, name: str, shape: tuple[int, ...], like: Tensor) -> Node:
        # The attribute itself comes with `finish`.
        node = self.graph.create_node("get_attr", f"{STORE}.{name}", name=f"{STORE}_{name}")
        if (fake := self.fake(shape, like)) is not None:
            node.meta[self.values_key] = fake
        return node

    def trains(self, weights: Iterable[Weight]) -> bool:
        return any(weight.tensor.requires_grad for weight in weights)

    def weight_node(self, weight: Weight) -> Node:
        if isinstance(weight.source, int):
            assert weight.node is not None
            return weight.node
        # A node of its own: the one there is may stand further down.
        node = self.graph.create_node("get_attr", weight.source)
        if (fake := self.fake(tuple(weight.tensor.shape), weight.tensor)) is not None:
            node.meta[self.values_key] = fake
        return node

    def finish(self, fusion: Fusion) -> fx.GraphModule:
        module = FusedGraphModule.of(self.root, self.graph, fusion)
        module.graph.lint()
        module.retie()
        return module


class ExportedProgramView(Program):
    """`torch.export.export`, before or after decompositions."""

    ops = Dialect(
        aten.linear.default,
        aten.split_with_sizes.default,
        aten.reshape.default,
        aten.t.default,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.add.Tensor,
        aten.cat.default,
    )

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.root = program.graph_module
        self.graph = _copy_graph(program.graph)
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

    def packed_weight(self, pack: Pack, like: Tensor) -> Node:
        self._packs[f"{STORE}.{pack.name}"] = pack
        return self._stored(pack.name, pack.shape, like, persistent=True)

    def derived_value(self, derived: Derived, like: Tensor) -> Node:
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
        node.meta["val"] = self.fake(shape, like)
        spec = InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), f"{STORE}.{name}", persistent=persistent)
        self._inputs.insert(index, spec)
        return node

    def trains(self, weights: Iterable[Weight]) -> bool:
        return False  # its operators are ATen's; `module()` of the program it was made from is what trains

    def weight_node(self, weight: Weight) -> Node:
        assert weight.node is not None  # an exported program calls no modules
        return weight.node

    def accumulate(self, y: Node, z: Node, up: Node, scale: float) -> Node:
        # The same as the torch function, written out: an exported program holds ATen operators only.
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

    def finish(self, fusion: Fusion) -> ExportedProgram:
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

        # Packs stand where the parameters are that are views of them: `torch.export.save` writes each dictionary's
        # memory once.
        packs = {target: tie(pack, resolve) for target, pack in self._packs.items()}
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


def same_sizes(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether sizes are known to be equal, without a guard on those that are dynamic."""
    return len(first) == len(second) and all(
        a is b or bool(statically_known_true(a == b)) for a, b in zip(first, second, strict=True)
    )


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


_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")


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
