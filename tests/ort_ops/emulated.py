"""The kernels of a GPU, run on the CPU thread by thread: the same indices, reads and arithmetic (``csrc/grid.h``)."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import torch
from torch import Tensor

from tests.ort_ops.draws import OPERATORS, Drawn

__all__ = ["aligned", "emulated", "planned"]

_ELEMENTS = (torch.float32, torch.float16, torch.bfloat16)
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_BLOCKS, _PARTS, _EDGES = 16, 8, 256


class _Call(ctypes.Structure):
    """As ``csrc/call.h`` has it."""

    _fields_ = [
        ("op", ctypes.c_int32),
        ("element", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("p", "z", "b", "bias", "z_bias")),
        *((name, ctypes.c_int64) for name in ("rows", "stride", "z_stride")),
        ("columns", ctypes.c_int32),
        ("blocks", ctypes.c_int32),
        ("block", ctypes.c_int32 * (5 * _BLOCKS)),
        ("ids", ctypes.c_void_p),
        ("share", ctypes.c_int32),
        ("adapters", ctypes.c_int32),
        ("edge", ctypes.c_uint16 * _EDGES),
        ("parts", ctypes.c_int32),
        ("part", ctypes.c_int32 * (3 * _PARTS)),
        *((name, ctypes.c_int32) for name in ("width", "up", "activation")),
        ("skip", ctypes.c_void_p),
        ("gamma", ctypes.c_void_p),
        ("group", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("out", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
    ]


def aligned(value: Tensor | None) -> Tensor | None:
    """At an address that 16 bytes can be read from, as ONNX Runtime's memory is; with a margin that shows a write."""
    if value is None:
        return None
    size = value.element_size()
    whole = value.new_full((value.numel() + 64 // size,), torch.nan if value.is_floating_point() else 1 << 60)
    offset = (-whole.data_ptr() % 16) // size
    found = whole[offset : offset + value.numel()].view(value.shape)
    found.copy_(value)
    return found


def _address(value: Tensor | None, index: int = 0) -> int | None:
    return None if value is None else value.data_ptr() + index * value.element_size()


def _prepared(call: Drawn) -> tuple[_Call, list[Tensor], list[Any]]:
    """The call, its outputs, and what must live as long."""
    given = {name: aligned(value) for name, value in call.inputs.items()}
    p, b, bias, z, ids = given["p"], given["B"], given["bias"], given["z"], given.get("ids")
    assert p is not None
    assert b is not None
    rank, columns = b.shape
    width, blocks, z_start = call.width, call.attributes["blocks"], call.attributes["z_start"]
    edges = call.attributes.get("adapters", ())
    parts = call.attributes.get("parts", (call.attributes.get("gate", call.attributes.get("start")), width))
    placed = [*zip(parts[::2], parts[1::2], itertools.accumulate(parts[1::2], initial=0), strict=False)]
    count = 2 if call.name == "LoraSkipRMSNorm" else 1
    outputs = [aligned(torch.full((*p.shape[:-1], width), torch.nan, dtype=p.dtype)) for _ in range(count)]
    found = _Call(
        op=OPERATORS.index(call.name),
        element=_ELEMENTS.index(p.dtype),
        p=_address(p),
        z=_address(p, z_start) if z is None else _address(z),
        b=_address(b),
        bias=_address(bias),
        z_bias=_address(bias, z_start) if z is None else None,
        rows=p[..., 0].numel(),
        stride=p.shape[-1],
        z_stride=p.shape[-1] if z is None else rank,
        columns=columns,
        blocks=len(blocks) // 5,
        block=(ctypes.c_int32 * (5 * _BLOCKS))(*blocks),
        ids=_address(ids),
        share=1 if ids is None else p[..., 0].numel() // ids.numel(),
        adapters=len(edges) // (len(blocks) // 5) - 1,
        edge=(ctypes.c_uint16 * _EDGES)(*edges),
        parts=len(placed),
        part=(ctypes.c_int32 * (3 * _PARTS))(*itertools.chain.from_iterable(placed)),
        width=width,
        up=call.attributes.get("up", 0),
        activation=_ACTIVATIONS.index(call.attributes.get("activation", "silu")),
        skip=_address(given.get("skip")),
        gamma=_address(given.get("gamma")),
        group=call.attributes.get("group", 0),
        epsilon=call.attributes.get("epsilon", 0.0),
        out=_address(outputs[0]),
        sum=_address(outputs[1]) if count == 2 else None,
    )
    return found, [value for value in outputs if value is not None], [given]


def emulated(call: Drawn, code: ctypes.CDLL) -> list[Tensor]:
    """What the GPU's kernel makes of a call."""
    prepared, outputs, _held = _prepared(call)
    code.flora_ort_emulate(ctypes.byref(prepared))
    return outputs


def planned(call: Drawn, code: ctypes.CDLL) -> tuple[int, ...]:
    """Which kernel: whether columns are read 16 bytes at once, and z; rows of a thread; chunks that a norm keeps.

    And in how many products the one for many rows computes it; 0 if it is not that one.
    """
    prepared, _outputs, _held = _prepared(call)
    numbers = [ctypes.c_int32() for _ in range(5)]
    code.flora_ort_plan(ctypes.byref(prepared), *map(ctypes.byref, numbers))
    return tuple(number.value for number in numbers)
