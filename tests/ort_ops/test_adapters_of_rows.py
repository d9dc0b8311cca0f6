"""Rows that choose among several adapters in one call: none has anything of another one's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.ort_ops.draws import ELEMENTS, OPERATORS, Drawn, draw, error, model
from tests.ort_ops.emulated import emulated, planned

Run = Callable[[Drawn], list[Tensor]]


@pytest.fixture(params=["onnxruntime", "the grid of a GPU"])
def run(request: pytest.FixtureRequest, options: Any, code: ctypes.CDLL) -> Run:
    """On ONNX Runtime's CPU, and as a GPU does."""
    if request.param != "onnxruntime":
        return lambda call: emulated(call, code)

    return lambda call: by_session(call, options)


def by_session(call: Drawn, options: Any) -> list[Tensor]:
    session = onnxruntime.InferenceSession(model(call), options, providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in call.inputs.items() if value is not None}
    return [torch.from_numpy(np.asarray(value)) for value in session.run(None, feeds)]


def three(name: str, ids: list[int], tokens: int, *, apart: bool = False, step: int = 8) -> Drawn:
    """A call of sequences of so many tokens. Of three adapters the second has no rows in the first block."""
    numbers = torch.Generator().manual_seed(len(ids) * tokens)

    def tensor(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=numbers)

    width, rank, lead = 6 * step, 8 * step, (len(ids), tokens)
    b = torch.zeros(rank, 2 * width)
    b[: 5 * step, :width] = tensor(5 * step, width)
    b[5 * step :, width:] = tensor(3 * step, width)
    attributes: dict[str, Any] = {
        "blocks": [0, width, 0, 5 * step, 0, width, 2 * width, 5 * step, rank, width],
        "adapters": [edge * step for edge in (0, 2, 2, 5, 5, 6, 7, 8)],
        "z_start": 0 if apart else 2 * width,
    }
    inputs: dict[str, Tensor | None] = {"p": tensor(*lead, 2 * width + (0 if apart else rank)), "B": b}
    if name == "LoraAdd":
        attributes["parts"] = [width, width, 0, width]
    elif name == "LoraSwiGLU":
        attributes |= {"gate": 0, "up": width, "width": width, "activation": "silu"}
    else:
        attributes |= {"start": 0, "width": 2 * width, "group": 2 * width, "epsilon": 1e-5}
        inputs |= {"gamma": tensor(2 * width), "skip": tensor(*lead, 2 * width)}
    inputs |= {"bias": None, "z": tensor(*lead, rank) if apart else None, "ids": torch.tensor(ids)}
    return Drawn(name, inputs, attributes)


def alone(call: Drawn, adapter: int) -> Drawn:
    """All rows with one adapter's part of each block, and no ids: as an export of that one alone has it."""
    count = len(call.attributes["adapters"]) // 2
    blocks = list(call.attributes["blocks"])
    for index in range(2):
        edges = call.attributes["adapters"][index * count : (index + 1) * count]
        blocks[5 * index + 2 : 5 * index + 4] = edges[adapter : adapter + 2] if adapter >= 0 else [0, 0]
    attributes = {**call.attributes, "blocks": blocks}
    del attributes["adapters"]
    return Drawn(call.name, {**call.inputs, "ids": None}, attributes)


@pytest.mark.parametrize("apart", [False, True], ids=["z in p", "z apart"])
@pytest.mark.parametrize(("tokens", "tile"), [(1, 1), (9, 4)])
@pytest.mark.parametrize("name", OPERATORS)
def test_each_row_is_what_its_adapter_alone_makes_it(
    name: str, tokens: int, tile: int, apart: bool, run: Run, code: ctypes.CDLL
) -> None:
    ids = [2, -1, 0, 1, 2, 2]
    call = three(name, ids, tokens, apart=apart)
    assert planned(call, code)[:3] == (1, 1, tile), "nine tokens: tiles of four rows have some of two sequences"
    each = {adapter: alone(call, adapter).expected() for adapter in ids}
    assert not torch.allclose(each[-1][0], each[2][0])
    for index, found in enumerate(run(call)):
        for row, adapter in enumerate(ids):
            assert error(found[row], each[adapter][index][row]) < 1, (row, adapter)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("name", OPERATORS)
def test_ranks_that_no_wide_read_of_z_has(name: str, tokens: int, run: Run, code: ctypes.CDLL) -> None:
    """All of B's rows in a block could be read so; those of an adapter cannot."""
    call = three(name, [2, -1, 0, 1], tokens)
    assert planned(call, code)[:2] == (1, 1)
    call.attributes["adapters"] = [0, 3, 17, 40, 40, 41, 62, 64]
    assert planned(call, code)[:2] == (1, 0)
    for found, expected in zip(run(call), call.expected(), strict=True):
        assert error(found, expected) < 1


@pytest.mark.parametrize("step", [8, 3], ids=["wide reads", "any size"])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("name", OPERATORS)
def test_what_overflowed_in_another_adapter_stays_there(name: str, tokens: int, step: int, run: Run) -> None:
    """Neither its B nor its z reaches another row: nothing is multiplied with zero."""
    call = three(name, [0, -1, 2, 1, 0], tokens, step=step)
    p, b = call.inputs["p"], call.inputs["B"]
    assert p is not None
    assert b is not None
    columns = call.attributes["z_start"]
    for first, last in ((0, 2), (5, 6)):  # the first adapter's
        b[first * step : last * step] = torch.inf
        p[..., columns + first * step : columns + last * step] = torch.nan
    for found, expected in zip(run(call), call.expected(), strict=True):
        assert found[[0, 4]].isnan().any()
        others = [1, 2, 3]
        assert found[others].isfinite().all()
        assert error(found[others], expected[others]) < 1


@pytest.mark.parametrize("far", [3, -2, 1 << 40, -(1 << 40), (1 << 32) + 1])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_id_of_no_adapter_is_none(name: str, far: int, run: Run) -> None:
    """Those that are one in 32 bits, too."""
    call = three(name, [far, 1], 2)
    base = alone(call, -1).expected()
    for found, expected in zip(run(call), base, strict=True):
        assert error(found[0], expected[0]) < 1
        assert error(found[1], expected[1]) > 100


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_every_kernel_with_rows_of_several_adapters_in_a_tile(name: str, dtype: torch.dtype, code: ctypes.CDLL) -> None:
    met = set()
    for seed in range(240):
        call = draw(name, dtype, seed)
        ids, p = call.inputs["ids"], call.inputs["p"]
        assert p is not None
        if ids is None:
            continue
        wide, wide_z, tile = planned(call, code)[:3]
        rows = ids.flatten().repeat_interleave(p[..., 0].numel() // ids.numel())
        if any(len(set(part.tolist())) > 1 for part in rows.split(tile)):
            met.add((wide, wide_z, tile))
            for found, expected in zip(emulated(call, code), call.expected(), strict=True):
                assert error(found, expected) < 1, (seed, call.attributes)
    assert met == {(wide, wide_z, 4) for wide, wide_z in ((0, 0), (1, 0), (1, 1))}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"adapters": None}, "ids and adapters are for each other"),
        ({"ids": None}, "ids and adapters are for each other"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "ids does not have the first dimensions of p"),
        ({"ids": torch.zeros(2, 4, 128, dtype=torch.int64)}, "ids does not have the first dimensions of p"),
        ({"adapters": [0, 16, 16]}, "adapters has 3 numbers; it must have 2 each for at most 128"),
        ({"adapters": [0] * 258}, "adapters has 258 numbers; it must have 2 each for at most 128"),
        ({"adapters": [0, 16, 48, 40, 48, 64]}, "adapters must follow each other within their blocks"),
        ({"adapters": [0, 41, 40, 64]}, "adapters must follow each other within their blocks"),
        ({"adapters": [0, 16, 8, 40, 40, 48, 48, 64]}, "adapters must follow each other within their blocks"),
    ],
)
@pytest.mark.parametrize("name", OPERATORS)
def test_what_cannot_be(name: str, change: dict[str, Any], said: str, options: Any) -> None:
    call = three(name, [0, 1], 4)
    for key, value in change.items():
        if key == "ids":
            call.inputs[key] = value
        elif value is None:
            del call.attributes[key]
        else:
            call.attributes[key] = value
    with pytest.raises(Exception, match=said):
        by_session(call, options)
