"""The operators of ``flora_ort`` on a GPU as on a CPU: random calls, long prompts, and replays of a CUDA graph."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_fx.export.run.session import Session
from tests.gpu.places import DEVICES, PROVIDERS
from tests.ort_ops.draws import ELEMENTS, OPERATORS, Drawn, draw, error, model
from tests.ort_ops.products import draw_product, product_model

CALLS = 30
pytestmark = pytest.mark.usefixtures("library")


def opened(call: Drawn, place: Path, device: str, *, cuda_graph: bool = False) -> Session:
    place.write_bytes(model(call))
    return Session(place, providers=[PROVIDERS[device]], cuda_graph=cuda_graph)


def given(call: Drawn) -> dict[str, Tensor]:
    return {name: value for name, value in call.inputs.items() if value is not None}


def assert_right(found: list[Tensor], call: Drawn, about: object) -> None:
    for value, expected in zip(found, call.expected(), strict=True):
        assert value.shape == expected.shape
        assert error(value.cpu(), expected) < 1, (about, call.attributes)


def drawn_anew(name: str, value: Tensor, numbers: torch.Generator) -> Tensor:
    if name == "ids":
        return torch.randint(-1, 6, value.shape, generator=numbers)
    return torch.randn(value.shape, generator=numbers).to(value)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
def test_random_calls(device: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("ONNX Runtime has no bfloat16 on the CPU")
    for seed in range(CALLS if device == "cuda" else 3):
        call = draw(name, dtype, seed)
        session = opened(call, tmp_path / "one.onnx", device)
        assert session.device == device
        assert_right(list(session.run(given(call)).values()), call, seed)


@pytest.mark.parametrize("several", [False, True], ids=["one adapter", "each row its own"])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
def test_sizes_of_models(device: str, name: str, several: bool, tmp_path: Path) -> None:
    """One token, a batch of them, and prompts whose length is no multiple of anything; a hidden size of 1B and 70B.

    Of eight adapters the others' B is infinite: rows must not see it.
    """
    numbers = torch.Generator().manual_seed(1)
    dtype = torch.float16 if device == "cuda" else torch.float32
    for columns, rank in ((2048, 16), (8192, 64), (20480, 8)) if device == "cuda" else ((2048, 16),):
        each = rank
        if several:
            rank *= 8
        blocks = [0, columns // 2, 0, rank, 0, columns // 2, columns, rank, 2 * rank, columns // 2]
        for rows in ((1, 1), (8, 1), (1, 1027), (3, 343)):
            p = torch.randn(*rows, columns + 2 * rank, generator=numbers).to(dtype)
            b = torch.zeros(2 * rank, columns, dtype=dtype)
            b[:rank, : columns // 2] = torch.randn(rank, columns // 2, generator=numbers).to(dtype)
            b[rank:, columns // 2 :] = torch.randn(rank, columns // 2, generator=numbers).to(dtype)
            attributes: dict[str, Any] = {"blocks": blocks, "z_start": columns}
            inputs: dict[str, Tensor | None] = {"p": p, "B": b}
            ids = None
            if several:
                attributes["adapters"] = [*range(0, rank + 1, each), *range(rank, 2 * rank + 1, each)]
                ids = torch.tensor([6, 0, -1, 3, 0, 5, 2, 6][: rows[0]])
                b.view(2, 8, each, columns)[:, [1, 4, 7]] = torch.inf
            if name == "LoraAdd":
                attributes["parts"] = [0, columns]
            if name == "LoraSwiGLU":
                attributes |= {"gate": 0, "up": columns // 2, "width": columns // 2, "activation": "silu"}
            if name == "LoraSkipRMSNorm":
                attributes |= {"start": 0, "width": columns, "group": columns, "epsilon": 1e-5}
                inputs["gamma"] = torch.randn(columns, generator=numbers).to(dtype)
                inputs["skip"] = torch.randn(*rows, columns, generator=numbers).to(dtype)
            call = Drawn(name, {**inputs, "bias": None, "z": None, "ids": ids}, attributes)
            session = opened(call, tmp_path / "one.onnx", device)
            assert_right(list(session.run(given(call)).values()), call, (columns, rows))


@pytest.mark.parametrize("several", [False, True], ids=["one adapter", "each row its own"])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
def test_replays_of_a_cuda_graph(device: str, name: str, several: bool, tmp_path: Path) -> None:
    """What is captured reads its inputs anew, B and the ids among them."""
    drawn = (draw(name, torch.float16 if device == "cuda" else torch.float32, seed) for seed in itertools.count(5))
    first = next(call for call in drawn if (call.inputs["ids"] is not None) is several)
    session = opened(first, tmp_path / "one.onnx", device, cuda_graph=device == "cuda")
    expected = first.expected()
    sizes = {key: tuple(value.shape) for key, value in given(first).items()}
    sizes |= {f"out{index}": tuple(value.shape) for index, value in enumerate(expected)}
    dtypes = {key: torch.int64 if key == "ids" else first.dtype for key in sizes}
    places = {
        key: (session.buffer(torch.Size(size).numel() * dtypes[key].itemsize), size) for key, size in sizes.items()
    }
    binding = session.bind(places, graph=1 if device == "cuda" else None)
    numbers = torch.Generator().manual_seed(7)
    for round_ in range(4):
        call = Drawn(
            name,
            {
                key: value if value is None or round_ == 0 else drawn_anew(key, value, numbers)
                for key, value in first.inputs.items()
            },
            first.attributes,
        )
        for key, value in given(call).items():
            buffer, size = places[key]
            buffer.nearest(size, dtypes[key]).copy_(value)
            buffer.flush()
        binding.run()
        found = []
        for key in sizes:
            if key.startswith("out"):
                buffer, size = places[key]
                buffer.download()
                found.append(buffer.nearest(size, first.dtype).cpu().clone())
        assert_right(found, call, round_)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_products(device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Few rows, and many: those ONNX Runtime multiplies."""
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("ONNX Runtime has no bfloat16 on the CPU")
    for seed in range(CALLS if device == "cuda" else 3):
        product = draw_product(dtype, seed)
        place = tmp_path / "one.onnx"
        place.write_bytes(product_model(product))
        session = Session(place, providers=[PROVIDERS[device]])
        assert session.device == device
        few = product.x[..., 0].numel() <= 8  # of others cuBLAS may add parts of a sum in float16
        found = [*session.run(product.given()).values()]
        for value, expected in zip(found, product.expected(), strict=True):
            assert value.shape == expected.shape
            assert error(value.cpu(), expected) < (1 if few else 16), seed
