"""`accumulate` against its plain reference, in float64, with strides and shapes that are not the easy ones."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from flora_fx.ops import accumulate, accumulate_reference


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 1, 4)])
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_accumulate_equals_its_reference(shape: tuple[int, ...], scale: float) -> None:
    packed = torch.randn(*shape, 6 + 3, dtype=torch.float64)
    y, z = packed.split([6, 3], -1)  # slices of a pack: not contiguous
    up = torch.randn(3, 6, dtype=torch.float64).t()
    before = packed.clone()
    found = accumulate(y, z, up, scale)
    torch.testing.assert_close(found, accumulate_reference(y, z, up, scale), rtol=1e-13, atol=1e-13)
    assert found.is_contiguous()
    assert torch.equal(packed, before)


def test_rows_may_be_flattened_on_one_side() -> None:
    y, z, up = torch.randn(2, 5, 6), torch.randn(10, 3), torch.randn(6, 3)
    torch.testing.assert_close(accumulate(y, z, up, 0.5), accumulate_reference(y, z, up, 0.5))


def test_gradients_flow_to_all_operands() -> None:
    y, z, up = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(2, 5, 6), (2, 5, 3), (6, 3)])
    assert torch.autograd.gradcheck(lambda *args: accumulate(*args, 0.3), (y, z, up))


def test_a_symbolic_trace_keeps_it_as_one_node() -> None:
    graph = fx.symbolic_trace(lambda y, z, up: accumulate(y, z, up, 0.3)).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [accumulate]
