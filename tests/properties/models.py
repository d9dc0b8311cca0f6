"""A program as a module, and how it runs: `execute` calls a `Model`, or what stands in for its weights and modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .meanings import ACTIVATIONS, BETWEEN, CHANGES, MAPS, NO_OPS, SCALES, VIEWS, WIDENS, tokens
from .programs import Branch, Change, Down, Join, Map, Matrix, Program, Project, Up, Use, Value, View
from .shapes import State, trace_shapes

__all__ = ["Model", "execute"]

NUMBER = 0.7


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
                if scale in BETWEEN:
                    z = BETWEEN[scale](m, z, shape)
                    shape = replace(shape, narrow=shape.narrow and scale not in WIDENS)
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
