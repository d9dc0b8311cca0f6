"""What the words of a program compute: each is a function of a `Model`, of values, and of their shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .programs import Value

if TYPE_CHECKING:
    from .models import Model

__all__ = ["ACTIVATIONS", "BETWEEN", "CHANGES", "MAPS", "NO_OPS", "SCALES", "VIEWS", "WIDENS", "tokens"]

NO_OPS: dict[str, Callable[[Model, Any, Value], Any]] = {
    "clone": lambda m, v, s: v.clone(),
    "contiguous": lambda m, v, s: v.contiguous(),
    "dropout in eval": lambda m, v, s: F.dropout(v, 0.3, False),
    "dropout": lambda m, v, s: m.module("drop", v),
    "identity": lambda m, v, s: m.module("same", v),
    "cast": lambda m, v, s: v.to(s.dtype),
    "reshape": lambda m, v, s: v.reshape(*s.shape),
    "there and back": lambda m, v, s: v.reshape(-1, s.width).reshape(*s.shape),
    "expand": lambda m, v, s: v.expand(*s.shape),
}
"""``dropout`` is one in eval mode only."""

ACTIVATIONS: dict[str, Callable[[Model, Any], Any]] = {
    "": lambda m, z: z,
    "relu": lambda m, z: F.relu(z),
    "silu": lambda m, z: F.silu(z),
    "gelu module": lambda m, z: m.module("gelu", z),
    "tanh method": lambda m, z: z.tanh(),
    "sigmoid": lambda m, z: torch.sigmoid(z),
    "softmax": lambda m, z: F.softmax(z, -1),
}

SCALES: dict[str, Callable[[Model, Any, Any, Value], Any]] = {
    "none": lambda m, y, u, s: y + u,
    "number": lambda m, y, u, s: y + u * m.number,
    "number first": lambda m, y, u, s: m.number * u + y,
    "another number": lambda m, y, u, s: y + 1.6 * u,
    "method": lambda m, y, u, s: y.add(u.mul(m.number)),
    "two numbers": lambda m, y, u, s: y + m.number * (u * 3),
    "alpha": lambda m, y, u, s: torch.add(y, u, alpha=m.number),
    "divided": lambda m, y, u, s: y + u / 3,
    "minus": lambda m, y, u, s: y - u / 3,
    "negated": lambda m, y, u, s: y + -u,
    "scalar": lambda m, y, u, s: y + u * m.buffer("scalar"),
    "one element": lambda m, y, u, s: y + m.buffer("one") * u,
    "scalar of another dtype": lambda m, y, u, s: y + u * m.buffer("narrow_scalar"),
    "data": lambda m, y, u, s: y + u * y.sum().tanh(),
    "token": lambda m, y, u, s: y + m.gate(s.rows) * u,
    "token of a buffer": lambda m, y, u, s: y + u * m.buffer(tokens(s.rows)),
    "feature": lambda m, y, u, s: y + u * m.buffer(f"feature_{s.width}"),
    "token selected": lambda m, y, u, s: y + torch.where(m.gate(s.rows) > 1, u, 0) * m.number,
    "token filled": lambda m, y, u, s: y + m.number * u.masked_fill(m.gate(s.rows) > 1, 0),
    "selected by feature": lambda m, y, u, s: y + torch.where(y > 0, u, 0),
    "twice": lambda m, y, u, s: y + m.number * (u + u * 2),
    "in place": lambda m, y, u, s: m.iadd(y, u * m.number),
    "in place, alpha": lambda m, y, u, s: y.add_(u, alpha=m.number),
    "in place, minus": lambda m, y, u, s: y.sub_(u / 3),
    "scaled in place": lambda m, y, u, s: y + u.mul_(m.number),
    "divided in place": lambda m, y, u, s: u.div_(3) + y,
    "after an activation": lambda m, y, u, s: y + F.silu(u),
}
BETWEEN: dict[str, Callable[[Model, Any, Value], Any]] = {
    "number between": lambda m, z, s: z * m.number,
    "divided between": lambda m, z, s: z / 4,
    "token between": lambda m, z, s: z * m.gate(s.rows),
    "feature between": lambda m, z, s: z * m.buffer(f"feature_{s.width}"),
    "scalar between": lambda m, z, s: m.buffer("scalar") * z,
    "token selected between": lambda m, z, s: torch.where(m.gate(s.rows) > 1, z * m.number, 0),
    "token chosen between": lambda m, z, s: torch.where((m.gate(s.rows) * 4).long() == 4, z, 0),
    "token chosen otherwise between": lambda m, z, s: torch.where((m.gate(s.rows) * 4).long() == 5, z, 0),
}
SCALES |= dict.fromkeys(BETWEEN, SCALES["none"])
WIDENS = ("one element", "token", "token of a buffer", "feature", "token between", "feature between")

MAPS: dict[str, Callable[[Model, Any, Value], Any]] = {
    "tanh": lambda m, v, s: torch.tanh(v),
    "relu": lambda m, v, s: F.relu(v),
    "half": lambda m, v, s: v * 0.5,
    "shift": lambda m, v, s: v + 1.0,
    "norm": lambda m, v, s: F.layer_norm(v, (s.width,)),
    "rms": lambda m, v, s: v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-3),
    "softmax": lambda m, v, s: torch.softmax(v, -1),
    "feature": lambda m, v, s: v * m.buffer(f"feature_{s.width}"),
    "gate": lambda m, v, s: v * m.gate(s.rows),
    "dropout": lambda m, v, s: m.module("drop", v),
    "detached": lambda m, v, s: v.detach(),
    "square": lambda m, v, s: v @ m.buffer(f"square_{s.width}").to(s.dtype),
}

VIEWS: dict[str, tuple[Callable[[Value], Value | None], Callable[[Any, Value], Any]]] = {
    # (the shape that comes of it, None where it can't be; the view, given that shape)
    "flat": (lambda s: replace(s, rows=(prod(s.rows),)), lambda v, s: v.reshape(-1, s.width)),
    "apart": (lambda s: replace(s, rows=(prod(s.rows), 1)), lambda v, s: v.reshape(*s.shape)),
    "alias": (lambda s: s, lambda v, s: v.view(*s.shape)),
    "transposed": (
        lambda s: replace(s, rows=(s.rows[1], s.rows[0], *s.rows[2:])) if len(s.rows) > 1 else None,
        lambda v, s: v.transpose(0, 1),
    ),
    "part": (lambda s: replace(s, width=-(-s.width // 2)), lambda v, s: v[..., : s.width]),
    "split": (lambda s: replace(s, width=s.width - 1) if s.width > 1 else None, lambda v, s: v.split(s.width, -1)[0]),
    "one more": (lambda s: replace(s, rows=(1, *s.rows)), lambda v, s: v.unsqueeze(0)),
    "by layout": (lambda s: s, lambda v, s: v.contiguous().as_strided(s.shape, strides(s.shape))),
}

CHANGES: dict[str, Callable[[Model, Any], Any]] = {
    "mul_": lambda m, v: v.mul_(0.9),
    "add_": lambda m, v: v.add_(1.0),
    "of a view": lambda m, v: v.view_as(v).mul_(0.9),
    "of a flat view": lambda m, v: v.reshape(-1).mul_(0.9),
    "of a part": lambda m, v: v[..., :1].mul_(0.5),
    "setitem": lambda m, v: m.setitem(v, 0.5),
    "relu": lambda m, v: F.relu(v, inplace=True),
    "out": lambda m, v: torch.mul(v, 0.9, out=v),
}


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape)))


def tokens(rows: tuple[int, ...]) -> str:
    return "_".join(map(str, ("tokens", *rows)))
