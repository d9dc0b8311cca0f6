"""An export of a large model in another dtype casts each weight where it is written: the same files, in less memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measure.memory import added_bytes
from flora_fx.export import ExportResult, export_onnx
from flora_fx.export.check import decoder
from flora_fx.export.check.layered import Run, in_float32
from flora_fx.export.directory import saving
from flora_fx.export.targets import _with_plain_attention
from flora_fx.export.trace import shapes_alone
from flora_fx.export.trace.model import private_copy, unwrap
from flora_fx.export.translate import direct
from flora_fx.internals import FakeTensor, FakeTensorMode
from flora_fx.storage.casting import cast_later, is_cast_later, numbers
from tests.export.exported_models import build
from tests.export.quantized import models as quantized
from tests.faults.models import adapted

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

Exporting = Callable[..., ExportResult]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is a large one."""
    monkeypatch.setattr(shapes_alone, "_LARGE", 0)


def files(result: ExportResult) -> dict[str, Any]:
    """Of an export, and what its manifest says but for the check and for how long the passes took."""
    found = {path.name: path.read_bytes() for path in result.directory.iterdir()}
    told = json.loads(found.pop("flora_fx.json"))
    return {**found, "flora_fx.json": {**told, "check": None, "fusion": None, "sha256": ""}}


CASES: dict[str, tuple[Callable[[], Any], torch.dtype, torch.dtype, dict[str, Any]]] = {
    "tied, swappable": (lambda: build("Llama", num_hidden_layers=1), HALF, SINGLE, {"hot_swap": True}),
    "layers alike": (lambda: build("Mistral", num_hidden_layers=3), BRAIN, SINGLE, {"verify": "quick"}),
    "to half precision": (lambda: build("Qwen3", num_hidden_layers=1), SINGLE, HALF, {"verify": "quick"}),
    "experts": (lambda: build("Mixtral", num_hidden_layers=1), HALF, SINGLE, {"verify": "quick"}),
    "slots": (lambda: adapted("same", "lower"), HALF, SINGLE, {"adapters": ["lower", "same"], "slots": 3}),
    "few bits": (lambda: quantized.build("4 bits"), HALF, SINGLE, {}),
    "an encoder": (lambda: build("bert", num_hidden_layers=1), HALF, SINGLE, {}),
}


# They go ways that other models go, and take as long as all others together.
SLOW = ("experts", "an encoder")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_the_files_are_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, stored, dtype, options = CASES[name]
    model = make().to(stored)
    at_once = export_onnx(model, tmp_path / "at once", dtype=dtype, **{**options, "verify": "none"})
    monkeypatch.setattr(shapes_alone, "_LARGE", 0)
    runs: list[Any] = []  # of a full check: what runs again and again is cast before
    run_model = decoder.run_model
    monkeypatch.setattr(decoder, "run_model", lambda model, *args: (runs.append(model), run_model(model, *args))[1])
    later = export_onnx(model, tmp_path / "later", dtype=dtype, **options)
    assert files(later) == files(at_once)
    assert later.report.fused
    assert later.verified == options.get("verify", "full")
    assert not any(is_cast_later(parameter) for run in runs for parameter in run.parameters())
    assert bool(runs) == (later.verified == "full" and name != "an encoder")
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {stored}


def test_a_layer_is_cast_once_for_all_texts(large: None) -> None:
    core = private_copy(unwrap(build("Llama").to(HALF)), SINGLE)
    seen: list[bool] = []
    with torch.no_grad(), in_float32(core, 2) as layered:
        layers: Any = layered.model.get_submodule("model.layers")

        def look(index: int) -> None:
            seen.extend(map(is_cast_later, layers[index].parameters()))

        layered.run([Run(lambda: layered.model(torch.tensor([[3, 1, 4]])).logits, look)] * 2)
    assert seen
    assert not any(seen)
    assert all(map(is_cast_later, core.parameters()))


def test_a_model_that_is_run_with_numbers_is_cast_before(large: None) -> None:
    """To be exported by the general route it is run many times."""
    core = private_copy(unwrap(build("bert").to(HALF)), SINGLE)
    private, _ = _with_plain_attention(core)
    assert all(map(is_cast_later, core.parameters()))
    assert not any(map(is_cast_later, private.parameters()))
    assert {parameter.dtype for parameter in private.parameters()} == {SINGLE}


def test_what_only_torch_onnx_translates(tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(direct.OPERATORS, torch.ops.aten.silu.default)
    result = export_onnx(build("Llama", num_hidden_layers=1).to(HALF), tmp_path / "out", dtype=SINGLE)
    assert result.greedy_tokens_equal
    assert result.max_rel_error < 1e-4


def test_a_model_that_takes_no_such_weights(tmp_path: Path, large: None) -> None:
    """It gets others, and is what it would have been."""
    model = build("Llama", num_hidden_layers=1).to(HALF)
    refused = []

    def refuse(module: Any, args: Any) -> None:
        if is_cast_later(module.weight):
            refused.append(module)
            raise TypeError("a weight without memory")

    model.get_submodule("base_model.model.model.norm").register_forward_pre_hook(refuse)
    result = export_onnx(model, tmp_path / "out", dtype=SINGLE, verify="none")
    assert refused
    assert result.target == "decoder"
    assert not result.notes


# In how much memory


@pytest.mark.parametrize("make", ["new_empty", "new_zeros", "new_ones"])
def test_who_asks_for_its_dtype_reads_nothing(make: str) -> None:
    later = cast_later(torch.ones(300, 500), HALF)

    def call() -> Tensor:
        made: Tensor = getattr(later, make)(2, 7)
        return made

    assert (call().shape, call().dtype, is_cast_later(call())) == (torch.Size([2, 7]), HALF, False)
    assert added_bytes(call, "cpu") < later.nbytes <= added_bytes(lambda: later * 1, "cpu")
    assert torch.equal(later.new_full((2,), 3.0), torch.full((2,), 3.0, dtype=HALF))


def test_a_run_without_numbers_reads_nothing() -> None:
    later, x = cast_later(torch.ones(300, 500), HALF), torch.ones(2, 500, dtype=HALF)

    def call() -> tuple[Tensor, ...]:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return nn.functional.linear(x, later), later.t(), numbers(later)

    assert all(isinstance(made, FakeTensor) for made in call())
    assert [made.shape for made in call()] == [torch.Size(size) for size in ((2, 300), (500, 300), (300, 500))]
    assert added_bytes(call, "cpu") < later.nbytes


def test_no_more_than_a_pack_is_cast_at_a_time(tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_WRITERS", 1)
    sizes = {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 512}
    model = build("Llama", **sizes).to(HALF)

    def export() -> None:
        export_onnx(model, tmp_path / "out", dtype=SINGLE, verify="quick")

    cast = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert added_bytes(export, "cpu") < cast / 3
