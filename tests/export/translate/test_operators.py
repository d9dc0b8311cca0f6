"""What is not known of an operator is said, and never guessed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from flora_fx.export.trace.traced import Traced
from flora_fx.export.translate.direct import Unknown, write_graph

X, Y = torch.randn(2, 3, 4), torch.randn(5, 3, 4)
WHOLE = torch.arange(24).reshape(2, 3, 4)
CACHE = torch.randn(2, 1, 3, 4)


class Calls(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x, y)


def traced(function: Callable[..., Any], x: Tensor, y: Tensor, outputs: int = 1) -> Traced:
    shapes = {"x": {0: Dim.AUTO}, "y": {0: Dim.AUTO}}
    program = torch.export.export(Calls(function), (x, y), dynamic_shapes=shapes, strict=False)
    return Traced(program, ("x", "y"), tuple("ab"[:outputs]), {})


def attention(x: Tensor, y: Tensor) -> Tensor:
    lengths = x.sum([1, 2]).to(torch.int32)
    given = (x, x, x, CACHE, CACHE, lengths, 3, None, None, 1, 1, 0.5, -1, 0.0, False)
    out: Tensor = torch.ops.flora_fx.group_query_attention(*given)[0]
    return out


CASES: dict[str, tuple[Callable[..., Any], Tensor, Tensor]] = {
    "aten.cos": (lambda x, y: x.cos(), X, Y),
    "dropout in training": (lambda x, y: F.dropout(x, 0.5, True), X, Y),
    "with alpha=2": (lambda x, y: torch.add(x, x, alpha=2), X, Y),
    "torch.int64 beside torch.float32": (lambda x, y: x / 3, WHOLE, Y),
    "True, which is no tensor": (lambda x, y: torch.ops.aten.mul.Tensor(x, True), X, Y),
    "torch.int64 to the power of 2": (lambda x, y: x**2, WHOLE, Y),
    "a layer norm of several dimensions": (lambda x, y: F.layer_norm(x, (3, 4)), X, Y),
    "with dtype=torch.float64": (lambda x, y: x.sum(1, dtype=torch.float64), X, Y),
    "of all, or in another dtype": (lambda x, y: x.sum(1), WHOLE > 3, Y),
    "parts of several dtypes": (lambda x, y: torch.cat([x, x.double()], -1), X, Y),
    "parts whose sizes are not known": (lambda x, y: x.chunk(2, 0)[0], Y, X),
    "a slice whose sizes are not known": (lambda x, y: y[:, : x.shape[0]], X, Y),
    "a size that no input has": (lambda x, y: x.reshape(x.shape[0] * 3, 2, 2), X, Y),
    "attention to caches of one size": (attention, X, Y),
}


@pytest.mark.parametrize("what", CASES)
def test_what_is_not_known_is_said(what: str) -> None:
    found = traced(*CASES[what])
    with pytest.raises(Unknown, match=what):
        write_graph(found.program, found)


def test_outputs_that_are_one_value_are_not_written() -> None:
    found = traced(lambda x, y: (x * y.sum(0), x * y.sum(0)), X, Y, outputs=2)
    with pytest.raises(Unknown, match="another output"):
        write_graph(found.program, found)


def test_what_is_known_is_written() -> None:
    found = traced(lambda x, y: (x * 2).tanh() + y.mean([0], True), X, Y)
    graph = write_graph(found.program, found).graph
    assert [node.op_type for node in graph] == ["Mul", "Tanh", "ReduceMean", "Add"]
    assert [value.name for value in (*graph.inputs, *graph.outputs)] == ["x", "y", "a"]
