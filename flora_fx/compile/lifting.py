"""Dynamo's graphs with their packs as inputs, and the call that keeps those tied.

    before   graph(x, W_q, W_k, A_q, …)                         weights come in as inputs, guarded by Dynamo
    after    graph(x, A_q, …, pack)                             what nothing reads any more is not passed on
             call(*args) = graph(*args[kept], *packs)           packs are tied to the arguments, checked at each call

Packs are inputs, not attributes: so the compiler behind takes them as it takes parameters (never copied, never folded,
of static address), and another pack needs no other graph. They are tied at the first call, not while Dynamo's backend
runs: Dynamo still holds the parameters' old strides and storage offsets then (torch 2.13).
"""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate as running
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from flora_fx.graph.builder import Builder
from flora_fx.graph.program import GraphModuleView
from flora_fx.internals import SET_GRAD_ENABLED, FakeTensor
from flora_fx.ir import Pack, Weight
from flora_fx.ops import matrix_vector
from flora_fx.storage.module import Fusion
from flora_fx.storage.pack import TYING, guard_backward, tie

__all__ = ["LiftedView", "PackedCall"]

log = logging.getLogger(__name__)


class RowBuilder(Builder):
    """On a CPU, lets one row go through a pack as `matrix_vector`, for a compiler that makes loops of its own.

    Inductor's loop streams weights at 26 to 32 GB/s where MKL's GEMM with one row gives 8 to 11 (AMD EPYC, 2 cores,
    float32, torch 2.13).
    """

    def linear(self, x: Node, weight: Node, bias: Node | None) -> Node:
        if self._is_one_row(x):
            return self.call(matrix_vector, x, weight, bias)
        return super().linear(x, weight, bias)

    def widened_linear(self, x: Node, others: Sequence[Node], weight: Node, bias: Node | None) -> Node:
        if not self._is_one_row(x):
            return super().widened_linear(x, others, weight, bias)
        # Each part of the row by its own columns: nothing has to be written beside anything first.
        edges = [0, *running(self.value(part).shape[-1] for part in (x, *others))]
        columns = [self.call(torch.ops.aten.slice.Tensor, weight, 1, *edge) for edge in pairwise(edges)]
        y = self.call(matrix_vector, x, columns[0], bias)
        for part, column in zip(others, columns[1:], strict=True):
            y = self.call(self.ops.add, y, self.call(matrix_vector, part, column, None))
        return y

    def accumulate(self, y: Node, z: Node, up: Node, scale: float) -> Node:
        if not self._is_one_row(z):
            return super().accumulate(y, z, up, scale)
        delta = self.call(self.ops.mul, self.linear(z, up, None), scale)
        return self.call(self.ops.add, y, self.reshape_to(delta, y))

    def _is_one_row(self, x: Node) -> bool:
        """One row, computed in full precision: not where autocast makes a linear compute in half."""
        value, before = self.value(x), self.value(self.origin) if self.origin else None
        if value.device.type != "cpu" or value.dtype not in (torch.float32, torch.float64):
            return False
        same = before is None or before.dtype == value.dtype
        return same and all(isinstance(size, int) and size == 1 for size in value.shape[:-1])


class LiftedView(GraphModuleView):
    """A graph of Dynamo's, for the passes; its packs become inputs behind those that it has.

    Attributes:
        records: whether gradients are recorded in the graph, or in a part of it.

    Args:
        root: the graph module, which `finish` changes.
        generates: whether the compiler behind makes loops of its own, as `RowBuilder` expects.
    """

    derives = False  # PEFT's layers with such values come in graphs of a piece each
    copies = False  # who calls a compiled graph watches where its parameters are, not their versions

    def __init__(self, root: fx.GraphModule, *, generates: bool = True) -> None:
        super().__init__(root)
        if generates:
            self.build = RowBuilder(self.graph, self.examples, self.build.ops)
        # Dynamo compiles anew where gradients are recorded and were not, unless the graph itself begins to.
        self.records = torch.is_grad_enabled() or any(n.target is SET_GRAD_ENABLED for n in root.graph.nodes)
        self._lifted: list[Node] = []

    def read_pack(self, pack: Pack, like: Tensor) -> Node:
        last = [*self._inputs, *self._lifted][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(f"flora_{pack.name}")
        node._dynamo_source = None
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        self.examples.give(node, self.examples.like(pack.shape, like))
        self._lifted.append(node)
        return node

    def trains(self, weights: Iterable[Weight]) -> bool:
        return self.records and super().trains(weights)

    def finish(self, fusion: Fusion) -> fx.GraphModule:
        """The graph module that was opened, with the rewritten graph."""
        self.graph.lint()
        self.root.graph = self.graph
        return self.root

    def drop_unread(self) -> list[int]:
        """Take out the weights that nothing reads any more; the indices of the inputs that stay."""
        kept = []
        for node, index in self._inputs.items():
            if node.users or self.weight(node) is None:
                kept.append(index)
            else:
                self.graph.erase_node(node)
        return kept

    def example_inputs(self, inputs: Sequence[Any], kept: Sequence[int]) -> list[Any]:
        """Example inputs of the rewritten graph, for the compiler behind."""
        return [*(inputs[index] for index in kept), *(self.value(node) for node in self._lifted)]


_calls: weakref.WeakSet[PackedCall] = weakref.WeakSet()


class PackedCall:
    """A compiled graph, called as Dynamo calls it, with its packs tied.

    Args:
        compiled: what the compiler behind made of the rewritten graph.
        packs: in the order of the graph's last inputs.
        kept: the indices of the arguments that are passed on.
    """

    def __init__(self, compiled: Callable[..., Any], packs: Sequence[Pack], kept: Sequence[int]) -> None:
        self._compiled = compiled
        self._packs = packs
        self._tensors: list[Tensor | None] = [None] * len(packs)
        self._members: list[list[weakref.ref[Tensor]]] = [[] for _ in packs]
        sources = dict.fromkeys(piece.source for pack in packs for piece in pack.slices)
        self._watched = _getter([int(source) for source in sources])
        self._kept = _getter(kept)
        # Where the members are, and the packs of these: one value, for another thread may call with another model.
        self._tied: tuple[list[int], tuple[Tensor, ...]] = ([], ())
        with TYING:
            _calls.add(self)

    def __call__(self, *args: Any) -> Any:
        watched = self._watched(args)
        seen, packs = self._tied
        if not seen and isinstance(next(iter(watched), None), FakeTensor):
            # Dynamo's optimizer for DDP runs the parts of a graph it has cut once, to see the shapes between them.
            return self._compiled(*self._kept(args), *(args[int(p.like)].new_empty(p.shape) for p in self._packs))
        # Microseconds: this runs before each call.
        if [*map(Tensor.data_ptr, watched)] != seen:
            with TYING:
                packs = self._tie(args)
        outputs = self._compiled(*self._kept(args), *packs)
        if torch.is_grad_enabled():
            guard_backward(_tensors(outputs), watched)
        return outputs

    def _tie(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """Make the packs hold the arguments' present values, and the arguments views of them."""
        packs = []
        known = {_storage(packed) for call in _calls for packed in call._tensors if packed is not None}
        for index, pack in enumerate(self._packs):
            members = [args[piece.source] for piece in pack.slices]  # type: ignore[index]
            before = {_storage(member) for member in members}
            packed = tie(pack, lambda source: args[source])  # type: ignore[index]
            if self._tensors[index] is not None and self._tensors[index] is not packed:
                log.info("the parameters of %s had been moved; they are packed anew", pack.name)
            packs.append(packed)
            self._tensors[index] = packed
            self._members[index] = [weakref.ref(member) for member in members]
            if left := before & known - {_storage(packed)}:
                for call in list(_calls):
                    call._forget(left)
        for call in list(_calls):
            call._sweep()
        self._tied = [*map(Tensor.data_ptr, self._watched(args))], tuple(packs)
        return self._tied[1]

    @torch.inference_mode(False)
    def _forget(self, storages: set[int]) -> None:
        """Let go of packs that parameters have left for another one, so that no weight stays stored twice."""
        for index, packed in enumerate(self._tensors):
            if packed is None or _storage(packed) not in storages:
                continue
            for reference in self._members[index]:
                member = reference()
                if member is not None and _storage(member) == _storage(packed):
                    member.data = member.detach().clone()
            self._tensors[index] = None
            self._tied = ([], ())

    def _sweep(self) -> None:
        """Let go of packs that all their parameters have left: of a graph that is not called again, say."""
        for index, packed in enumerate(self._tensors):
            if packed is None:
                continue
            members = [reference() for reference in self._members[index]]
            if all(member is None or _storage(member) != _storage(packed) for member in members):
                self._tensors[index] = None
                self._tied = ([], ())


def _getter(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """``operator.itemgetter`` that gives a tuple for any number of indices."""
    if len(indices) < 2:
        return lambda args: tuple(args[index] for index in indices)
    return operator.itemgetter(*indices)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(outputs: Any) -> list[Tensor]:
    found = outputs if isinstance(outputs, tuple | list) else [outputs]
    return [output for output in found if isinstance(output, Tensor)]
