"""The operations of fused graphs against plain references, in float64, with strides and shapes not the easy ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from flora_fx.ops import (
    _runs,
    accumulate,
    accumulate_reference,
    accumulate_unrolled,
    matrix_vector,
    packed_projection,
    packed_projection_reference,
)

FORMS = pytest.mark.parametrize("form", [accumulate, accumulate_unrolled], ids=lambda form: form.__name__)


@FORMS
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 1, 4)])
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_accumulate_equals_its_reference(form: Any, shape: tuple[int, ...], scale: float) -> None:
    packed = torch.randn(*shape, 6 + 3, dtype=torch.float64)
    y, z = packed.split([6, 3], -1)  # slices of a pack: not contiguous
    up = torch.randn(3, 6, dtype=torch.float64).t()
    before = packed.clone()
    found = form(y, z, up, scale)
    torch.testing.assert_close(found, accumulate_reference(y, z, up, scale), rtol=1e-13, atol=1e-13)
    assert found.is_contiguous()
    assert torch.equal(packed, before)


@FORMS
def test_rows_may_be_flattened_on_one_side(form: Any) -> None:
    y, z, up = torch.randn(2, 5, 6), torch.randn(10, 3), torch.randn(6, 3)
    torch.testing.assert_close(form(y, z, up, 0.5), accumulate_reference(y, z, up, 0.5))


@FORMS
@pytest.mark.parametrize("rows", [(2, 5), (10,)])
@pytest.mark.parametrize("wanted", ["yzu", "y", "z", "u"])
def test_gradients_flow_to_all_operands(form: Any, rows: tuple[int, ...], wanted: str) -> None:
    y, z, up = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=name in wanted)
        for name, shape in {"y": (2, 5, 6), "z": (*rows, 3), "u": (6, 3)}.items()
    )
    assert torch.autograd.gradcheck(lambda *args: form(*args, 0.3), (y, z, up))


def test_an_unrolled_sum_is_rounded_once() -> None:
    """In bfloat16 it is float64's in its last place; as an adapter's author writes it, the delta is rounded, too."""
    y, z, up = (torch.randn(*shape).bfloat16() for shape in [(40, 50), (40, 16), (50, 16)])
    exact = accumulate_reference(y.double(), z.double(), up.double(), 0.7)
    found = accumulate_unrolled(y, z, up, 0.7)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())
    assert not torch.equal(accumulate_reference(y, z, up, 0.7), found)


@FORMS
def test_a_symbolic_trace_keeps_each_as_one_node(form: Any) -> None:
    graph = fx.symbolic_trace(lambda y, z, up: form(y, z, up, 0.3)).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [form]
    graph = fx.symbolic_trace(lambda x, pack, a: packed_projection(x, pack, None, [(0, 3, False)], a)).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [packed_projection]


ROWS = [(0, 6, False), (6, 8, False), (8, 11, True), (0, 6, False), (8, 11, False)]
"""W [6, 4], A [2, 4], a transposed A [4, 3], the bias of W, the bias of the transposed A."""


def members(requires_grad: str = "wabcd") -> list[Tensor]:
    shapes = {"w": (6, 4), "a": (2, 4), "b": (4, 3), "c": (6,), "d": (3,)}
    return [
        torch.randn(shape, dtype=torch.float64, requires_grad=name in requires_grad) for name, shape in shapes.items()
    ]


def pack(w: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return torch.cat([w, a, b.t()]), torch.cat([c, c.new_zeros(2), d])


def reference(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return packed_projection_reference(x, [w, a, b.t()], [c, None, d])


@pytest.mark.parametrize("trained", ["wabcd", "a", "b", "ab", "wa", "cd", "bc", "d"])
@pytest.mark.parametrize("leading", [(5,), (2, 3)])
def test_a_packed_projection_trains_what_requires_gradients_and_nothing_else(
    trained: str, leading: tuple[int, ...]
) -> None:
    tensors = members(trained)
    x = torch.randn(*leading, 4, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(*leading, 11, dtype=torch.float64)
    expected = torch.autograd.grad(reference(x, *tensors), [x, *(t for t in tensors if t.requires_grad)], seed)
    found = packed_projection(x, *pack(*tensors), ROWS, *tensors)
    torch.testing.assert_close(found, reference(x, *tensors), rtol=1e-13, atol=1e-13)
    found.backward(seed)
    gradients = [x.grad, *(tensor.grad for tensor in tensors if tensor.requires_grad)]
    torch.testing.assert_close(gradients, list(expected), rtol=1e-12, atol=1e-12)
    assert all(tensor.grad is None for tensor in tensors if not tensor.requires_grad)


def test_neighbours_are_one_gemm_in_the_backward() -> None:
    """dA of siblings that stand under each other: one product, not one each."""
    tensors = [torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)]
    x = torch.randn(5, 4)
    y = packed_projection(x, torch.cat(tensors).detach(), None, [(0, 2, False), (2, 5, False)], *tensors)
    with torch.profiler.profile() as profile:
        y.sum().backward()
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::mm") == 1


def test_a_member_changed_before_the_backward_is_noticed() -> None:
    tensors = members()
    y = packed_projection(torch.randn(5, 4, dtype=torch.float64), *pack(*tensors), ROWS, *tensors)
    with torch.no_grad():
        tensors[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_backward_cannot_be_differentiated_again() -> None:
    tensors = members()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = packed_projection(x, *pack(*tensors), ROWS, *tensors)
    [first] = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_autocast_computes_as_linear_does() -> None:
    tensors = [tensor.detach().float().requires_grad_() for tensor in members()]
    packed, bias = (tensor.float() for tensor in pack(*tensors))
    x = torch.randn(5, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = packed_projection(x, packed, bias, ROWS, *tensors)
        expected = reference(x, *tensors)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    found.float().sum().backward()
    assert x.grad is not None
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in tensors)


@pytest.mark.parametrize("leading", [(1,), (1, 1)])
def test_matrix_vector_equals_linear(leading: tuple[int, ...]) -> None:
    x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in [(*leading, 6), (5, 6), (5,)])
    for given in (bias, None):
        expected = torch.nn.functional.linear(x, weight, given)
        torch.testing.assert_close(matrix_vector(x, weight, given), expected, rtol=1e-13, atol=1e-13)


def test_gradients_are_one_gemm_for_neighbours_alone() -> None:
    """What stands between two members that train costs nothing."""
    members = [torch.empty(stop - start, 4) for start, stop in ((0, 3), (3, 9), (9, 11), (11, 12))]
    rows = [(0, 3, False), (3, 9, False), (9, 11, False), (11, 12, False)]
    assert list(_runs(rows, members, [True, False, True, True])) == [[0], [2, 3]]
    assert list(_runs(rows, members, [False] * 4)) == []
