"""What a rewrite leaves without readers goes, but for what has effects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from flora_fx.passes.rewrite.clean import erase_unread

aten = torch.ops.aten


@pytest.mark.parametrize("target", [aten.rand_like.default, aten.relu_.default])
def test_an_operand_with_effects_stays_unless_nobody_sees_them(target: Any) -> None:
    """As a random draw does, whose successors would be others without it, and a change in place."""

    def left(*, alone: bool) -> list[Any]:
        graph = fx.Graph()
        x = graph.placeholder("x")
        effect = graph.call_function(target, (x,))
        plain = graph.call_function(aten.neg.default, (effect,))
        top = graph.call_function(aten.neg.default, (plain,))
        graph.output(x)
        erase_unread(graph, [top], [effect] if alone else [])
        return [node.target for node in graph.nodes if node.op == "call_function"]

    assert left(alone=False) == [target]
    assert left(alone=True) == []
