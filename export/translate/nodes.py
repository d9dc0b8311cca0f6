"""ONNX nodes, made one after the other; what is there already is not made again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor

__all__ = ["Nodes", "Weight", "as_it_was"]

_Attribute = int | float | str | Sequence[int]
_TURNED = "flora_fx.turned"
"""Of an initializer that is a weight transposed, the weight."""


@dataclass(frozen=True)
class Weight:
    """A weight of a program.

    Attributes:
        name: in the user's model.
        like: the weight; where there is ``make``, its shape and dtype alone.
        make: makes it, when it is written.
    """

    name: str
    like: Tensor
    make: Callable[[], Tensor] | None = None


class Nodes:
    """The nodes and initializers of a graph that is being written.

    Attributes:
        nodes: in order.
        initializers: weights and constants.
        axes: what the symbolic sizes of values are called.
    """

    def __init__(self, axes: Mapping[str, str]) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.axes = axes
        self._made: dict[Any, tuple[ir.Value, ...]] = {}
        self._constants: dict[Any, ir.Value] = {}
        self._weights: dict[str, ir.Value] = {}
        self._numbers = itertools.count()

    def add(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        like: Sequence[Tensor | None],
        *,
        domain: str = "",
        **attributes: _Attribute,
    ) -> tuple[ir.Value, ...]:
        """The outputs of a node, which have the dtypes and shapes of ``like``; None for what nobody reads."""
        key = (op, domain, tuple(map(id, inputs)), tuple(sorted((k, _hashable(v)) for k, v in attributes.items())))
        if key not in self._made:
            outputs = [self._value(tensor) for tensor in like]
            given = ir.convenience.convert_attributes(attributes)
            node = ir.Node(domain, op, inputs, given, outputs=outputs, name=f"{op}_{next(self._numbers)}")
            self.nodes.append(node)
            self._made[key] = tuple(outputs)
        return self._made[key]

    def constant(self, value: float | bool | Sequence[float], dtype: torch.dtype) -> ir.Value:
        """A small initializer: a number, or a vector of numbers."""
        key = (repr(value), dtype)
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            tensor = TorchTensor(torch.tensor(value, dtype=dtype), name=name)
            self._constants[key] = self._initializer(name, tensor)
        return self._constants[key]

    def weight(self, weight: Weight) -> ir.Value:
        """An initializer that is a weight as it is."""
        if weight.name not in self._weights:
            if weight.make is None:
                tensor: Any = TorchTensor(weight.like.detach(), name=weight.name)
            else:
                tensor = _lazy(weight.name, weight.make, weight.like)
            self._weights[weight.name] = self._initializer(weight.name, tensor)
        return self._weights[weight.name]

    def turned(self, weight: Weight) -> ir.Value:
        """An initializer that is a matrix transposed, ``<name>.T``; it is transposed when it is written, not before."""
        name = f"{weight.name}.T"
        if name not in self._weights:

            def make() -> Tensor:
                whole = weight.like.detach() if weight.make is None else weight.make()
                return whole.t().contiguous()

            self._weights[name] = self._initializer(name, _lazy(name, make, weight.like.t()))
            self._weights[name].meta[_TURNED] = weight
        return self._weights[name]

    def _initializer(self, name: str, tensor: Any) -> ir.Value:
        shape = ir.Shape(tuple(map(int, tensor.shape)))
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.initializers.append(value)
        return value

    def _value(self, like: Tensor | None) -> ir.Value:
        name = f"value_{next(self._numbers)}"
        if like is None:
            return ir.Value(name=name)
        return ir.Value(name=name, shape=self.shape(like), type=ir.TensorType(from_torch_dtype(like.dtype)))

    def shape(self, like: Tensor) -> ir.Shape:
        """A value's shape, sizes by their names."""
        return ir.Shape([size if isinstance(size, int) else self.axes.get(str(size), str(size)) for size in like.shape])


def as_it_was(graph: ir.Graph, turned: ir.Value) -> ir.Value | None:
    """The weight that `Nodes.turned` transposed, as an initializer; None of any other value."""
    weight = turned.meta.get(_TURNED)
    if not isinstance(weight, Weight):
        return None
    if (known := graph.initializers.get(weight.name)) is not None:
        return known
    tensor: Any = TorchTensor(weight.like.detach(), name=weight.name)
    if weight.make is not None:
        tensor = _lazy(weight.name, weight.make, weight.like)
    shape = ir.Shape(tuple(map(int, tensor.shape)))
    value = ir.Value(name=weight.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _lazy(name: str, make: Callable[[], Tensor], like: Tensor) -> ir.LazyTensor:
    """Made when it is written, and not kept: one weight at a time in memory."""
    return ir.LazyTensor(
        lambda: TorchTensor(make(), name=name),
        dtype=from_torch_dtype(like.dtype),
        shape=ir.Shape(tuple(like.shape)),
        name=name,
    )


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple | numpy.ndarray) else value
