"""Projections and down-projections of one read that may be combined as one likes; what is read of the packs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx import FuseConfig
from flora_fx.ir import Pack
from tests.adapters import D_IN

AHEAD, FOLDED = FuseConfig(layout="ahead"), FuseConfig(layout="ahead", fold_scale=True)
D_HIDDEN = 16


class Free(nn.Module):
    """Projections q, k, v and down-projections a, c of one read, o behind q and k; `form` says what is written."""

    def __init__(self, form: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.form = form
        self.q, self.k, self.v = nn.Linear(D_IN, 10), nn.Linear(D_IN, 6, bias=False), nn.Linear(D_IN, 8, bias=False)
        self.a, self.c = nn.Linear(D_IN, 3, bias=False), nn.Linear(D_IN, 5, bias=False)
        self.qa, self.qa2, self.ka = (nn.Linear(3, n, bias=False) for n in (10, 10, 6))
        self.qc, self.vc = nn.Linear(5, 10, bias=False), nn.Linear(5, 8, bias=False)
        self.biased = nn.Linear(3, 10)
        self.o = nn.Linear(D_HIDDEN, D_IN)
        self.oa, self.oc = nn.Linear(3, D_IN, bias=False), nn.Linear(5, D_IN, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.form(self, x)


def frozen(model: nn.Module) -> Any:
    return model.double().eval().requires_grad_(False)


def places(pack: Pack) -> dict[str, tuple[tuple[int, int], tuple[int, int] | None]]:
    """(rows, columns) of a pack's members, by name."""
    pieces = zip(pack.members, pack.slices, strict=True)
    return {name.removesuffix(".weight"): (piece.rows, piece.columns) for name, piece in pieces}


def parts(fused: Any) -> list[int]:
    """How many values are written beside each other for each widened GEMM."""
    return [len(node.args[0]) for node in fused.graph.nodes if node.name.startswith("cat") and node.args[1] == -1]


def hidden(q: Tensor, k: Tensor) -> Tensor:
    return torch.tanh(torch.cat([q, k], -1))


def own_and_others(m: Free, x: Tensor) -> Tensor:
    """a is written onto q, which reads the same; c onto o, further down."""
    z = m.c(x)
    return m.o(hidden(m.q(x) + m.qa(m.a(x)) * 0.7, m.k(x))) + m.oc(z) * 1.3


def own_and_others_of_one_base(m: Free, x: Tensor) -> Tensor:
    z = m.c(x)
    return m.o(hidden(m.q(x) + m.qa(m.a(x)) * 0.7, x[..., :6])) + m.oc(z) * 1.3


def others_alone(m: Free, x: Tensor) -> Tensor:
    z = m.c(x)
    return m.o(hidden(m.q(x), m.k(x))) + m.oc(z) * 1.3


def one_for_both(m: Free, x: Tensor) -> Tensor:
    z = m.a(x)
    return m.o(hidden(m.q(x) + m.qa(z) * 0.7, m.k(x))) + m.oa(z) * 1.3


def sibling_is_returned(m: Free, x: Tensor) -> tuple[Tensor, ...]:
    q = m.q(x)
    return m.v(x) + m.vc(m.c(x)) * 0.7, q + m.qa(m.a(x)) * 0.7, q
