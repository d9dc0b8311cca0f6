"""Random calls of the operators of ``flora_ort``, as ONNX Runtime, the emulated grid and the oracle take them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from onnx import helper
from torch import Tensor

from flora_ort import reference

__all__ = ["ELEMENTS", "OPERATORS", "Drawn", "draw", "error", "model"]

OPERATORS = ("LoraAdd", "LoraSwiGLU", "LoraSkipRMSNorm")
ELEMENTS = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}
_ORACLES: dict[str, Callable[..., Any]] = {
    "LoraAdd": reference.lora_add,
    "LoraSwiGLU": reference.lora_swiglu,
    "LoraSkipRMSNorm": reference.lora_skip_rms_norm,
}
_INPUTS = dict.fromkeys(OPERATORS, ("p", "B", "bias", "z", "ids")) | {
    "LoraSkipRMSNorm": ("p", "B", "gamma", "skip", "bias", "z", "ids")
}
_UNITS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Of half a unit in the last place, relative."""


@dataclass(frozen=True)
class Drawn:
    """A call.

    Attributes:
        name: of the operator.
        inputs: by name, in order; None for one that is left out.
        attributes: all that it has.
    """

    name: str
    inputs: dict[str, Tensor | None]
    attributes: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """Of all inputs and outputs."""
        assert self.inputs["p"] is not None
        return self.inputs["p"].dtype

    @property
    def width(self) -> int:
        """Of the outputs."""
        width: int = sum(self.attributes["parts"][1::2]) if self.name == "LoraAdd" else self.attributes["width"]
        return width

    def expected(self) -> list[Tensor]:
        """By the oracle, in float64."""
        given = [
            value.double() if value is not None and value.is_floating_point() else value
            for value in self.inputs.values()
        ]
        found = _ORACLES[self.name](*given, **self.attributes)
        return list(found) if isinstance(found, tuple) else [found]


def draw(
    name: str, dtype: torch.dtype, seed: int, *, rows: tuple[int, ...] | None = None, aligned: bool = False
) -> Drawn:
    """A call with any mix of ranks, of any shape: sizes that are read in 16 bytes at once, and sizes that are not.

    Parts of p stand in any order, those without an adapter among them, and B's columns in another one. In every second
    call rows choose among several adapters.

    Args:
        name: of the operator.
        dtype: of all inputs and outputs.
        seed: of the draw.
        rows: the leading sizes; None for any.
        aligned: only sizes that the kernel for many rows takes.
    """
    dice = random.Random(f"{name} {dtype} {seed}")
    numbers = torch.Generator().manual_seed(seed)

    def tensor(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=numbers).to(dtype)

    step = 32 if aligned else dice.choice((1, 8, 8, 8))  # of columns
    low = dice.choice((8, 16) if aligned else (1, 8, 8))  # of ranks
    head = step * dice.choice((1, 2, 4, 16))
    count = 2 if name == "LoraSwiGLU" else dice.choice((1, 3))
    widths = (
        [step * dice.randint(1, 40)] * 2 if name == "LoraSwiGLU" else [head * dice.randint(1, 5) for _ in range(count)]
    )
    ranks = [dice.choice((0, low, 2 * low, 3 * low)) for _ in range(count)]
    ranks[dice.randrange(count)] = low * dice.randint(1, 4)
    starts, ends = [*itertools.accumulate(widths, initial=0)], [*itertools.accumulate(ranks, initial=0)]
    adapted = [index for index in range(count) if ranks[index]]
    dice.shuffle(adapted)
    blocks: list[int] = []
    b = torch.zeros(ends[-1], sum(widths[index] for index in adapted), dtype=dtype)
    source = 0
    for index in adapted:
        first, last, width = ends[index], ends[index + 1], widths[index]
        b[first:last, source : source + width] = tensor(last - first, width)
        blocks += [starts[index], starts[index] + width, first, last, source]
        source += width
    columns, rank = starts[-1], ends[-1]
    apart = dice.random() < 0.3
    gap = step * dice.randint(0, 2)
    wide = columns + gap if apart else -(-(columns + gap + rank) // step) * step + step * dice.randint(0, 1)
    if not apart and not aligned and dice.random() < 0.3:
        wide += 1  # rows that begin anywhere
    lead = rows or dice.choice(((1, 1), (2, 3), (1, 37), (5, 8), (67,), (7, 6)))
    inputs: dict[str, Tensor | None] = {"p": tensor(*lead, wide), "B": b}
    attributes: dict[str, Any] = {"blocks": blocks, "z_start": 0 if apart else columns + gap}
    if name == "LoraAdd":
        wanted = dice.sample(range(count), dice.randint(1, count))
        attributes["parts"] = [number for index in wanted for number in (starts[index], widths[index])]
    elif name == "LoraSwiGLU":
        gate = dice.randrange(2)
        attributes |= {"gate": starts[gate], "up": starts[1 - gate], "width": widths[0]}
        attributes["activation"] = dice.choice(("silu", "gelu", "gelu_tanh"))
    else:
        part = dice.randrange(count)
        attributes |= {"start": starts[part], "width": widths[part], "epsilon": dice.choice((1e-6, 1e-5, 0.1))}
        attributes["group"] = head if dice.random() < 0.4 else widths[part]
        inputs["gamma"] = tensor(attributes["group"])
        inputs["skip"] = tensor(*lead, widths[part]) if dice.random() < 0.7 else None
    inputs["bias"] = tensor(wide) if dice.random() < 0.4 and (apart or not aligned) else None
    inputs["z"] = tensor(*lead, rank) if apart else None
    inputs["ids"] = None
    if not aligned and dice.random() < 0.5:
        several = dice.randint(1, 5)
        per_row = len(lead) if dice.random() < 0.3 else 1
        chosen = [dice.randint(-1, several) for _ in range(math.prod(lead[:per_row]))]
        inputs["ids"] = torch.tensor(chosen, dtype=torch.int64).reshape(lead[:per_row])
        attributes["adapters"] = []
        for first, last in zip(blocks[2::5], blocks[3::5], strict=True):
            inner = sorted(first + low * dice.randint(0, (last - first) // low) for _ in range(several - 1))
            attributes["adapters"] += [first, *inner, last]
    return Drawn(name, inputs, attributes)


def model(call: Drawn) -> bytes:
    """An ONNX model of that one node; outputs are named ``out0`` and ``out1``."""
    element = ELEMENTS[call.dtype]
    given = {name: value for name, value in call.inputs.items() if value is not None}
    outputs = ["out0", "out1"] if call.name == "LoraSkipRMSNorm" else ["out0"]
    names = [name if name in given else "" for name in _INPUTS[call.name]]
    node = helper.make_node(call.name, names, outputs, domain="flora_ort", **call.attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, 7 if name == "ids" else element, list(value.shape))
            for name, value in given.items()
        ],
        [helper.make_tensor_value_info(name, element, None) for name in outputs],
    )
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("flora_ort", 1)]
    made: bytes = helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
    return made


def error(found: Tensor, expected: Tensor) -> float:
    """How far off numbers are at most, in roundings to their dtype: one is not to be avoided.

    Sums in float32 have an error of their own, relative to what is summed up: the largest number stands for that.
    """
    unit, size = _UNITS[found.dtype], expected.abs()
    allowed = unit * size + 32 * _UNITS[torch.float32] * size.max().clamp(min=1.0) + torch.finfo(found.dtype).tiny
    return float(((found.double() - expected).abs() / allowed).max())
