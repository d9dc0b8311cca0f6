"""Programs as graphs: those that torch captures, and two that are made as it would make them, in a part of the time.

written     the nodes of torch.fx.symbolic_trace, made directly: patching and searching is most of a trace's time
shaped      the same with example values, as graphs of torch.export and Dynamo have them
decomposed  ATen operators with example values, from make_fx, as after decompositions
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.proxy import GraphAppendingTracer

import flora_fx

from .models import Model, execute

__all__ = ["BRANCHING", "CAPTURES", "QUICK", "SHAPELESS"]

Inputs = tuple[Tensor, Tensor]


def written(model: Model, inputs: Inputs, *, symbols: bool = False) -> fx.GraphModule:
    """``symbols``: the number that most scales are is read from the module, not written into the graph."""
    graph = fx.Graph(tracer_cls=fx.Tracer)
    tracer = GraphAppendingTracer(graph)
    stand_in: Any = _StandIn(model, tracer)
    if symbols:
        stand_in.number = tracer.create_proxy("get_attr", "number", (), {})
    x, gate = (fx.Proxy(graph.placeholder(name), tracer) for name in ("x", "gate"))
    graph.output(tracer.create_arg(execute(stand_in, model.program, x, gate)))
    return fx.GraphModule(model, graph)


class _StandIn:
    """Answers what a program asks of its model with nodes that read it."""

    number = Model.number

    def __init__(self, model: Model, tracer: GraphAppendingTracer) -> None:
        self.program = model.program
        self._tracer = tracer
        self._read: dict[str, fx.Proxy] = {}
        self._gate: Any = None

    def attribute(self, name: str) -> fx.Proxy:
        if name not in self._read:  # the nodes of a symbolic trace, too, are one a parameter
            self._read[name] = self._tracer.create_proxy("get_attr", name, (), {})
        return self._read[name]

    def weight(self, index: int) -> fx.Proxy:
        return self.attribute(f"w{index}.weight")

    def bias(self, index: int) -> fx.Proxy:
        return self.attribute(f"w{index}.bias")

    def buffer(self, name: str) -> fx.Proxy:
        return self._tracer.create_proxy("get_attr", name, (), {})

    def module(self, name: str, value: Any) -> fx.Proxy:
        return self._tracer.create_proxy("call_module", name, (value,), {})

    def iadd(self, y: Any, u: Any) -> fx.Proxy:
        return self._tracer.create_proxy("call_function", operator.iadd, (y, u), {})

    def setitem(self, value: Any, number: float) -> None:
        self._tracer.create_proxy("call_function", operator.setitem, (value, (..., 0), number), {})

    gate = Model.gate


def shaped(model: Model, inputs: Inputs) -> fx.GraphModule:
    graph = written(model, inputs)
    FakeTensorProp(graph, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
    return graph


def decomposed(model: Model, inputs: Inputs) -> fx.GraphModule:
    trace = make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)
    return trace(*(value.detach() for value in inputs))


def traced(model: Model, inputs: Inputs) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def captured(model: Model, inputs: Inputs) -> fx.GraphModule:
    return flora_fx.capture(model, *inputs)


def exported(model: Model, inputs: Inputs) -> Any:
    return torch.export.export(model, inputs)


def exported_decomposed(model: Model, inputs: Inputs) -> Any:
    return torch.export.export(model, inputs).run_decompositions()


CAPTURES: dict[str, Callable[[Model, Inputs], Any]] = {
    capture.__name__: capture
    for capture in (written, shaped, decomposed, traced, captured, exported, exported_decomposed)
}
SHAPELESS = ("written", "traced")
QUICK = ("written", "shaped", "decomposed", "traced")
BRANCHING = ("captured", "exported", "exported_decomposed")
"""Those that take `torch.cond`."""
