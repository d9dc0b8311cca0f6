"""Errors that only something odd can cause, each caused: what is wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import flora_fx
from flora_fx.adapters.link import Link
from flora_fx.commands.ending import Outcome
from flora_fx.commands.generating import generate
from flora_fx.errors import ExportError, FloraError, TieError
from flora_fx.export import Decoder, load, load_decoder
from flora_fx.export.check.differences import Differences
from flora_fx.export.describing import describe
from flora_fx.export.directory.manifest import read_manifest
from flora_fx.export.lora.swappable import SwappableWeight
from flora_fx.export.run.session import Session
from flora_fx.export.run.swapping import SwappableAdapter
from flora_fx.export.translate import lowering
from flora_fx.export.translate.lowering import lower
from flora_fx.export.translate.swappable import make_swappable, swappable_weights
from flora_fx.ir import Pack, Role, Slice

from .exports import by_hand, reseal
from .models import adapted
from .test_threads import X, model


def odd(**attributes: Any) -> Any:
    return SimpleNamespace(**attributes)


def session(place: Path) -> Session:
    return Session(by_hand(place / "out") / "model.onnx")


def bfloat16(place: Path) -> None:
    reseal(by_hand(place / "out"), dtype="bfloat16")
    load(place / "out", providers=["CPUExecutionProvider"])


def swapped_in_an_encoder(place: Path) -> None:
    generate(by_hand(place / "out"), place, None, "1,2", {}, Outcome(), silent=True)


def text_of_an_encoder(place: Path) -> None:
    generate(by_hand(place / "out"), None, None, "1,2", {}, Outcome(), silent=True)


def another_kind_of_adapter(place: Path) -> None:
    piece = Slice("blocks.0.flora_A.default.weight", Role.DOWN, (0, 3))
    packs = [Pack("mixed", (3, 4), (piece,), "x", "w.weight")]
    list(swappable_weights(odd(graph=odd(initializers={})), odd(packs=packs)))  # type: ignore[arg-type]


def declined(place: Path) -> None:
    make_swappable(odd(), odd(declines=["o_proj: it is tied"]), adapted().base_model.model)


def a_weight_that_is_not_there(place: Path) -> None:
    SwappableAdapter(session(place), [SwappableWeight("lora", False, ())])


def growing_keys_in_a_cuda_graph(place: Path) -> None:
    manifest = read_manifest(by_hand(place / "out"))
    Decoder(odd(cuda_graph=True), manifest)


def float64(place: Path) -> None:
    core = adapted().base_model.model.double()
    describe(core, core, "causal-lm", odd(), odd())


EXPORTS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "shape": (
        lambda _: Differences("float32").add("the logits", torch.ones(2, 3), torch.ones(2, 4)),
        ExportError,
        r"the export returns the logits in shape \[2, 3\], not \[2, 4\]",
    ),
    "bfloat16": (bfloat16, ExportError, "is in bfloat16, which ONNX Runtime does not compute on a CPU; use a GPU, or"),
    "cuda_graph on a CPU": (
        lambda place: load(by_hand(place / "out", "causal-lm"), providers=["CPUExecutionProvider"], cuda_graph=True),
        ExportError,
        "cuda_graph needs the CUDAExecutionProvider; .* runs on CPUExecutionProvider",
    ),
    "cuda_graph of growing keys": (
        growing_keys_in_a_cuda_graph,
        ExportError,
        "cuda_graph needs an export whose target is 'decoder'; this one is 'general'",
    ),
    "an encoder as a decoder": (
        lambda place: load_decoder(by_hand(place / "out")),
        ExportError,
        r"out is of kind 'encoder', and no causal LM; open it with load$",
    ),
    "a graph that is none": (
        lambda place: ((place / "model.onnx").write_bytes(b"no graph"), Session(place / "model.onnx")),
        ExportError,
        r"^ONNX Runtime cannot load .*model\.onnx: ",
    ),
    "an input that does not fit": (
        lambda place: session(place).run({"x": torch.ones(2, 5)}),
        ExportError,
        r"ONNX Runtime failed on inputs {'x': \[2, 5\]}: ",
    ),
    "swap in an encoder": (
        swapped_in_an_encoder,
        FloraError,
        "--adapter is for causal LMs exported with --hot-swap; .*out is none",
    ),
    "text of an encoder": (
        text_of_an_encoder,
        FloraError,
        r"out continues no text \(Encoder\(.*\)\); flora_fx\.export\.load runs it from Python",
    ),
    "hot_swap, declined": (declined, ExportError, "needs an adapter that is fused completely; declined: o_proj"),
    "hot_swap, another kind": (
        another_kind_of_adapter,
        ExportError,
        r"hot_swap needs a LoRA of PEFT; blocks\.0\.flora_A\.default\.weight belongs to another kind of adapter",
    ),
    "hot_swap, no weight": (a_weight_that_is_not_there, ExportError, "has no weight lora that may be replaced; export"),
    "float64": (float64, ExportError, "the model's weights are torch.float64; pass dtype= one of float32, float16, bf"),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_of_an_export(tmp_path: Path, case: str) -> None:
    cause, error, message = EXPORTS[case]
    with pytest.raises(error, match=message):
        cause(tmp_path)


def test_a_graph_that_torch_cannot_translate(monkeypatch: pytest.MonkeyPatch) -> None:
    program = torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),))

    def fail(*_: Any, **__: Any) -> None:
        raise torch.onnx.OnnxExporterError("no translation of aten.odd\nand a long story")

    monkeypatch.setattr(lowering, "as_onnx_nodes", lambda found: found)
    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"^torch\.onnx cannot translate the graph: no translation of aten\.odd$"):
        lower(program, odd(inputs=(), outputs=()))


def test_a_member_on_another_device() -> None:
    fused: Any = flora_fx.fuse(fx.symbolic_trace(model()))
    fused.get_submodule("k").to("meta")
    with pytest.raises(TieError, match=r"k\.weight is on meta and its pack qk on cpu\. Move the whole fused module to"):
        fused(X)


class Written(nn.Module):
    """One end of an FFBA adapter, without the other."""

    def __init__(self) -> None:
        super().__init__()
        self.link = Link("q_proj", writers=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.link.take("o_proj")


def test_half_of_an_ffba_adapter_is_not_captured() -> None:
    with pytest.raises(flora_fx.CaptureError, match="o_proj adds what q_proj reads, which has not run before it in"):
        flora_fx.capture(Written(), torch.ones(2, 3))
