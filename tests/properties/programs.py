"""Programs with adapters in them, as data: what a user's forward does, step by step.

    Program(rows=(2, 3), width=5, matrices=(…), steps=(Project(0, Use(0)), Down(0, Use(1)), Up(1, 0, Use(2), "number")))

is a base, an A and a B: ``y = W x; z = A x; y + 0.7 · B z``. The repr of a program is the program: a failure is
repeated by pasting it. `Model` runs one; what it calls (`Model.weight`, `Model.module`, …) another object may stand in
for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "ACTIVATIONS",
    "CHANGES",
    "MAPS",
    "NO_OPS",
    "SCALES",
    "VIEWS",
    "Branch",
    "Change",
    "Down",
    "Join",
    "Map",
    "Matrix",
    "Model",
    "Program",
    "Project",
    "Step",
    "Up",
    "Use",
    "Value",
    "View",
    "trace_shapes",
]

NUMBER = 0.7


@dataclass(frozen=True)
class Matrix:
    """A weight and perhaps a bias.

    Attributes:
        out, into: its sizes.
        bias: whether it has one.
        columns: stored as [into, out], as transformers' Conv1D does.
        narrow: float32, where the others are float64.
        trains: requires gradients.
        over: the index of an earlier matrix, of the same shape, that it shares memory with.
    """

    out: int
    into: int
    bias: bool = False
    columns: bool = False
    narrow: bool = False
    trains: bool = False
    over: int | None = None


@dataclass(frozen=True)
class Value:
    """What a step gives: a tensor (none while a program is drawn), its shape but for the width, its width."""

    tensor: Any
    rows: tuple[int, ...]
    width: int
    narrow: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.rows, self.width)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.narrow else torch.float64


@dataclass(frozen=True)
class Use:
    """How a matrix is multiplied with: the form it is written in, and the no-ops that the operand goes through."""

    matrix: int
    form: str = "linear"
    through: tuple[str, ...] = ()


@dataclass(frozen=True)
class Project:
    """A projection of a value: a base, unless something makes more of it."""

    read: int
    use: Use


@dataclass(frozen=True)
class Down:
    """The first half of an adapter: it gives a low-rank value, not a value."""

    read: int
    use: Use
    activation: str = ""


@dataclass(frozen=True)
class Up:
    """The second half of an adapter: a low-rank value, projected and added to a value."""

    target: int
    low: int
    use: Use
    scale: str = "number"
    through: tuple[str, ...] = ()


@dataclass(frozen=True)
class Map:
    """A function of one value."""

    read: int
    function: str


@dataclass(frozen=True)
class Join:
    """Two values of one shape, or of the same rows, made one."""

    read: int
    other: int
    function: str


@dataclass(frozen=True)
class View:
    """A value in another form, sharing its memory mostly."""

    read: int
    form: str


@dataclass(frozen=True)
class Change:
    """A value changed in place; nothing new comes of it."""

    read: int
    form: str


@dataclass(frozen=True)
class Branch:
    """``torch.cond`` on a value: a projection with an adapter in one branch, a projection in the other."""

    read: int
    base: int
    down: int
    up: int


Step = Project | Down | Up | Map | Join | View | Change | Branch


@dataclass(frozen=True)
class Program:
    """A forward of two inputs: ``x`` [*rows, width] and ``gate`` [*rows, 1].

    Attributes:
        returns: the values that are returned, by index; ``lows`` and ``deltas`` likewise.
        strided: whether x is a transposed view.
        input_trains: whether x requires gradients.
        training: whether the module is in training mode: its dropout is active then.
    """

    rows: tuple[int, ...]
    width: int
    matrices: tuple[Matrix, ...]
    steps: tuple[Step, ...]
    returns: tuple[int, ...]
    lows: tuple[int, ...] = ()
    deltas: tuple[int, ...] = ()
    strided: bool = False
    input_trains: bool = False
    training: bool = False

    @property
    def ups(self) -> list[tuple[Up, Down]]:
        """The adapters: each up-projection with what it reads."""
        downs = [step for step in self.steps if isinstance(step, Down)]
        return [(step, downs[step.low]) for step in self.steps if isinstance(step, Up)]

    @property
    def permuted(self) -> bool:
        """Whether a value may stand in memory in another order than that of its dimensions."""
        return self.strided or any(isinstance(step, View) and step.form == "transposed" for step in self.steps)

    @property
    def narrow(self) -> bool:
        return any(matrix.narrow for matrix in self.matrices)


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
_BETWEEN: dict[str, Callable[[Model, Any, Value], Any]] = {
    "number between": lambda m, z, s: z * m.number,
    "divided between": lambda m, z, s: z / 4,
    "token between": lambda m, z, s: z * m.gate(s.rows),
    "feature between": lambda m, z, s: z * m.buffer(f"feature_{s.width}"),
    "scalar between": lambda m, z, s: m.buffer("scalar") * z,
    "token selected between": lambda m, z, s: torch.where(m.gate(s.rows) > 1, z * m.number, 0),
    "token chosen between": lambda m, z, s: torch.where((m.gate(s.rows) * 4).long() == 4, z, 0),
    "token chosen otherwise between": lambda m, z, s: torch.where((m.gate(s.rows) * 4).long() == 5, z, 0),
}
SCALES |= dict.fromkeys(_BETWEEN, SCALES["none"])
_WIDENS = ("one element", "token", "token of a buffer", "feature", "token between", "feature between")

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


class Columns(nn.Module):
    """A weight stored as [into, out]."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias


class Model(nn.Module):
    """Runs a program. Its weights and inputs are drawn from torch's generator."""

    number = NUMBER

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        for index, matrix in enumerate(program.matrices):
            self.add_module(f"w{index}", self._linear(matrix))
        self.drop, self.same, self.gelu = nn.Dropout(0.3), nn.Identity(), nn.GELU()
        for name, shape in _buffers(program).items():
            self.register_buffer(name, torch.rand(shape, dtype=torch.float64) + 0.5)
        self.register_buffer("narrow_scalar", torch.tensor(0.625))
        self.train(program.training)
        self._gate: Any = None

    def _linear(self, matrix: Matrix) -> nn.Module:
        dtype = torch.float32 if matrix.narrow else torch.float64
        weight = torch.randn(matrix.out, matrix.into, dtype=dtype) / matrix.into**0.5
        if matrix.columns:
            weight = weight.t().contiguous()
        if matrix.over is not None:
            weight = getattr(self, f"w{matrix.over}").weight.data[:]
        bias = nn.Parameter(torch.randn(matrix.out, dtype=dtype), matrix.trains) if matrix.bias else None
        parameter = nn.Parameter(weight, matrix.trains)
        if matrix.columns:
            return Columns(parameter, bias)
        linear = nn.Linear(1, 1, bias=False)
        linear.in_features, linear.out_features = matrix.into, matrix.out
        linear.weight, linear.bias = parameter, bias
        return linear

    def inputs(self) -> tuple[Tensor, Tensor]:
        rows, width = self.program.rows, self.program.width
        shape = (rows[1], rows[0], *rows[2:]) if self.program.strided else rows
        x, gate = torch.randn(*shape, width, dtype=torch.float64), torch.rand(*rows, 1, dtype=torch.float64) + 0.5
        return (x.transpose(0, 1) if self.program.strided else x).requires_grad_(self.program.input_trains), gate

    def forward(self, x: Tensor, gate: Tensor) -> list[Tensor]:
        return execute(self, self.program, x, gate)

    # What a program asks of its model, so that something else can stand in for one.

    def weight(self, index: int) -> Any:
        return getattr(self, f"w{index}").weight

    def bias(self, index: int) -> Any:
        return getattr(self, f"w{index}").bias

    def module(self, name: str, value: Any) -> Any:
        return getattr(self, name)(value)

    def buffer(self, name: str) -> Any:
        return getattr(self, name)

    def gate(self, rows: tuple[int, ...]) -> Any:
        return self._gate if rows == self.program.rows else self._gate.reshape(*rows, 1)

    def iadd(self, y: Any, u: Any) -> Any:
        y += u
        return y

    def setitem(self, value: Any, number: float) -> None:
        value[..., 0] = number


def _buffers(program: Program) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"scalar": (), "one": (1,)}
    values, lows, _ = trace_shapes(program)
    for step in program.steps:
        if isinstance(step, Up):
            width = lows[step.low].width if "between" in step.scale else values[step.target].width
            found[f"feature_{width}"] = (width,)
            found[tokens(values[step.target].rows)] = (*values[step.target].rows, 1)
        elif isinstance(step, Map):
            width = values[step.read].width
            found |= {f"feature_{width}": (width,), f"square_{width}": (width, width)}
    return found


def trace_shapes(program: Program) -> tuple[list[Value], list[Value], list[Value]]:
    """The shapes of a program's values, of its low-rank values, and of what its adapters add."""
    state = State(program)
    for step in program.steps:
        state.follow(step)
    return state.values, state.lows, state.deltas


class State:
    """The shapes of what a program has computed so far."""

    def __init__(self, program: Program) -> None:
        self.values = [Value(None, program.rows, program.width)]
        self.lows: list[Value] = []
        self.deltas: list[Value] = []
        self.matrices = program.matrices

    def follow(self, step: Step, matrices: Sequence[Matrix] | None = None) -> None:
        matrices = self.matrices if matrices is None else matrices
        match step:
            case Project(read, use) | Down(read, use):
                matrix = matrices[use.matrix]
                found = replace(self.values[read], width=matrix.out, narrow=matrix.narrow)
                (self.values if isinstance(step, Project) else self.lows).append(found)
            case Up(target, _, use):
                narrow = matrices[use.matrix].narrow
                found = self.values[target]
                self.deltas.append(replace(found, narrow=narrow))
                widened = step.scale in _WIDENS and step.scale not in _BETWEEN
                stays = (narrow and not widened) or step.scale.startswith("in place")
                self.values.append(replace(found, narrow=found.narrow and stays))
            case Map(read):
                found = self.values[read]
                wide = step.function in ("feature", "gate")  # whose tensors are not narrow
                self.values.append(replace(found, narrow=found.narrow and not wide))
            case Join(read, other, function):
                one, two = self.values[read], self.values[other]
                width = one.width + two.width if function == "cat" else one.width
                self.values.append(replace(one, width=width, narrow=one.narrow and two.narrow))
            case View(read, form):
                shown = VIEWS[form][0](self.values[read])
                assert shown is not None
                self.values.append(shown)
            case Branch(read, base):
                self.values.append(replace(self.values[read], width=matrices[base].out))
            case Change():
                pass


def execute(m: Model, program: Program, x: Any, gate: Any) -> list[Any]:
    """Run a program on tensors, or on what stands for them."""
    m._gate = gate
    state = State(program)
    values, lows, deltas = [x * 1], [], []
    for step in program.steps:
        match step:
            case Project(read, use):
                values.append(_project(m, use, values[read], state.values[read]))
            case Down(read, use, activation):
                lows.append(ACTIVATIONS[activation](m, _project(m, use, values[read], state.values[read])))
            case Up(target, low, use, scale, through):
                z, shape = lows[low], state.lows[low]
                if scale in _BETWEEN:
                    z = _BETWEEN[scale](m, z, shape)
                    shape = replace(shape, narrow=shape.narrow and scale not in _WIDENS)
                u = _project(m, use, z, shape)
                matrix, goal = program.matrices[use.matrix], state.values[target]
                u = _through(m, through, u, replace(shape, width=matrix.out, narrow=matrix.narrow))
                if shape.rows != goal.rows:
                    u = u.reshape(*goal.rows, matrix.out)
                deltas.append(u)
                values.append(SCALES[scale](m, values[target], u, goal))
            case Map(read, function):
                values.append(MAPS[function](m, values[read], state.values[read]))
            case Join(read, other, function):
                values.append(_join(function, values[read], values[other]))
            case View(read, form):
                shown = VIEWS[form][0](state.values[read])
                assert shown is not None
                values.append(VIEWS[form][1](values[read], shown))
            case Change(read, form):
                CHANGES[form](m, values[read])
            case Branch(read, base, down, up):
                values.append(_branch(m, values[read], base, down, up))
        state.follow(step)
    kept = [values[i] for i in program.returns] + [lows[i] for i in program.lows] + [deltas[i] for i in program.deltas]
    return list(kept)


def _through(m: Model, names: Sequence[str], value: Any, shape: Value) -> Any:
    for name in names:
        value = NO_OPS[name](m, value, shape)
    return value


def _project(m: Model, use: Use, value: Any, shape: Value) -> Any:
    matrix = m.program.matrices[use.matrix]
    if shape.narrow != matrix.narrow:
        shape = replace(shape, narrow=matrix.narrow)
        value = value.to(shape.dtype)
    value = _through(m, use.through, value, shape)
    if use.form == "module":
        return m.module(f"w{use.matrix}", value)
    weight, bias = m.weight(use.matrix), m.bias(use.matrix) if matrix.bias else None
    match use.form:
        case "linear":
            return F.linear(value, weight, bias)
        case "addmm":
            return torch.addmm(bias, value, weight if matrix.columns else weight.t())
        case "Conv1D":
            rows = torch.addmm(bias, value.view(-1, value.size(-1)), weight)
            return rows.view(value.size()[:-1] + (matrix.out,))  # noqa: RUF005 - a proxy cannot be unpacked
        case "matmul":
            y = torch.matmul(value, weight if matrix.columns else weight.transpose(0, 1))
        case _:
            y = value @ (weight if matrix.columns else weight.T)
    return y if bias is None else y + bias


def _join(function: str, one: Any, two: Any) -> Any:
    match function:
        case "cat":
            return torch.cat([one, two], -1)
        case "mul":
            return torch.sigmoid(one) * two
        case "sub":
            return one - two
    return one + two


def _branch(m: Model, value: Any, base: int, down: int, up: int) -> Any:
    def adapted(v: Any) -> Any:
        return F.linear(v, m.weight(base)) + F.linear(F.linear(v, m.weight(down)), m.weight(up)) * m.number

    def plain(v: Any) -> Any:
        return torch.tanh(F.linear(v, m.weight(base)))

    return torch.cond(value.sum() > 0, adapted, plain, (value,))
