"""Hand-written adapters: every way people write LoRA, on weights that are not square, B not zero, scale not 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D_IN, D_OUT, RANK = 12, 10, 3


def linear(d_in: int, d_out: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(d_in, d_out, bias=bias)


class Adapted(nn.Module):
    """One projection and one adapter; `form` says how the forward is written."""

    def __init__(self, form: Callable[[Adapted, Tensor], Tensor], bias: bool = False, ab_bias: bool = False) -> None:
        super().__init__()
        self.form = form
        self.w = linear(D_IN, D_OUT, bias)
        self.a, self.b = linear(D_IN, RANK, ab_bias), linear(RANK, D_OUT, ab_bias)
        self.a2, self.b2 = linear(D_IN, RANK + 2), linear(RANK + 2, D_OUT)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("scaling", torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


def _iadd(m: Adapted, x: Tensor) -> Tensor:
    y = m.w(x)
    y += m.b(m.a(x)) * 0.3
    return y


def _sum_of_two_into_one(m: Adapted, x: Tensor) -> Tensor:
    return m.w(x) + (m.b(m.a(x)) * 0.3 + m.b2(m.a2(x)) * 1.7)


FORMS: dict[str, Callable[[Adapted, Tensor], Tensor]] = {
    "peft": lambda m, x: m.w(x) + m.b(m.a(m.drop(x))) * 2.5,
    "operands swapped": lambda m, x: 2.5 * m.b(m.a(x)) + m.w(x),
    "loralib": lambda m, x: m.w(x) + (x @ m.a.weight.T @ m.b.weight.T) * 0.3,
    "loralib transpose()": lambda m, x: m.w(x) + (x @ m.a.weight.transpose(0, 1) @ m.b.weight.transpose(0, 1)) * 0.3,
    "torchtune": lambda m, x: m.w(x) + (8 / RANK) * m.b(m.a(m.drop(x))),
    "scale between": lambda m, x: m.w(x) + m.b(0.3 * m.a(x)),
    "two scales": lambda m, x: m.w(x) + 0.5 * m.b(m.a(x) * 3.0),
    "divided": lambda m, x: m.w(x) + m.b(m.a(x)) / 4,
    "no scale": lambda m, x: m.w(x) + m.b(m.a(x)),
    "alpha of add": lambda m, x: torch.add(m.w(x), m.b(m.a(x)), alpha=0.3),
    "subtracted": lambda m, x: m.w(x) - m.b(m.a(x)) * 0.3,
    "negated": lambda m, x: m.w(x) + -m.b(m.a(x)),
    "method add": lambda m, x: m.w(x).add(m.b(m.a(x)).mul(0.3)),
    "in place": _iadd,
    "functional": lambda m, x: F.linear(x, m.w.weight, m.w.bias) + 0.3 * F.linear(F.linear(x, m.a.weight), m.b.weight),
    "tensor scale": lambda m, x: m.w(x) + m.b(m.a(x)) * m.scaling,
    "two adapters": lambda m, x: m.w(x) + m.b(m.a(x)) * 0.3 + m.b2(m.a2(x)) * 1.7,
    "two adapters, one scale": lambda m, x: m.w(x) + m.b(m.a(x)) * 0.3 + 0.3 * m.b2(m.a2(x)),
    "two adapters added first": _sum_of_two_into_one,
    "two adapters, scaled together": lambda m, x: m.w(x) + 0.3 * (m.b(m.a(x)) + m.b2(m.a2(x))),
    "one A, two B": lambda m, x: m.w(x) + 0.3 * m.b(m.a(x)) + 0.3 * F.linear(m.a(x), m.b2.weight[:, :RANK]),
    "matmul base": lambda m, x: (
        torch.matmul(x, m.w.weight.t()) + 0.3 * torch.matmul(x @ m.a.weight.t(), m.b.weight.t())
    ),
    "identity and dropout": lambda m, x: m.w(m.drop(x)) + m.b(m.drop(m.a(m.drop(x)))) * 0.3,
}
"""Each computes ``w x + s b a x`` (or two such terms)."""

TWO_ADAPTERS = {name for name in FORMS if name.startswith("two adapters")}


class Siblings(nn.Module):
    """q, k, v on one read: ranks 3, none and 5, one bias; then a chained output projection with a residual."""

    def __init__(self, scales: tuple[float, float] = (0.7, 0.7)) -> None:
        super().__init__()
        self.scales = scales
        self.q, self.k, self.v = linear(D_IN, 10), linear(D_IN, 6, bias=True), linear(D_IN, 8)
        self.q_a, self.q_b = linear(D_IN, 3), linear(3, 10)
        self.v_a, self.v_b = linear(D_IN, 5), linear(5, 8)
        self.o, self.o_a, self.o_b = linear(24, D_IN, bias=True), linear(24, 4), linear(4, D_IN)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x) + self.q_b(self.q_a(x)) * self.scales[0]
        k = self.k(x)
        v = self.v(x) + self.v_b(self.v_a(x)) * self.scales[1]
        h = torch.cat([torch.tanh(q), k, v], -1)
        return x + (self.o(h) + self.o_b(self.o_a(h)) * 1.3)
