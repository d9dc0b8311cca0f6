"""When exports use ``flora_ort``, and what is said where it is not there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import flora_ort
from benchmarks.contenders.models import Adapted, make_model
from benchmarks.contenders.settings import Settings
from flora_fx.checkout import checkout
from flora_fx.errors import ExportError
from flora_fx.export import Decoder, export_onnx, load
from flora_fx.export.directory import operators
from flora_fx.export.directory.manifest import read_manifest
from tests.export.stand_in import CUDA, FakeCuda

CPU = "CPUExecutionProvider"
IDS = torch.tensor([[11, 23, 5, 40]])


def small(adapted: Adapted = "peft") -> Any:
    return make_model(Settings("tiny", layers=1, rank=4), adapted)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Path:
    """An export in the operators."""
    place = tmp_path_factory.mktemp("written") / "out"
    export_onnx(small(), place, custom_ops=True)
    return place


@pytest.fixture
def not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLORA_ORT_LIBRARY", str(tmp_path / "nowhere.so"))


@pytest.mark.usefixtures("not_there")
def test_a_directory_says_that_it_needs_the_library(written: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"needed, and there is no .*nowhere\.so; build it: python -m flora_ort.build"
    ):
        load(written)
    with pytest.raises(ExportError, match="nowhere"):
        export_onnx(small(), tmp_path / "out", custom_ops=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("not_there")
def test_without_the_library_operators_are_plain(cuda: FakeCuda) -> None:
    assert not operators.choose_operators(None, CUDA)


def test_without_the_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "flora_ort", None)
    monkeypatch.setattr(operators.flora_fx, "__file__", str(tmp_path / "flora_fx" / "__init__.py"))
    with pytest.raises(ExportError, match=r"there is no library of them; build it by `make ops`"):
        operators.operators_library(CPU)


@pytest.mark.skipif(checkout() is None, reason="flora_ort/ is a checkout's")
def test_beside_the_other_folders_of_a_checkout(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    monkeypatch.delitem(sys.modules, "flora_ort")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry or ".") / "flora_ort").is_dir()])
    before = list(sys.path)
    assert operators.operators_library(CPU) == library
    assert sys.path == before


def test_a_library_without_cuda(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    monkeypatch.setattr(operators, "_has_cuda", lambda path: False)
    assert operators.operators_library(CPU) == library
    with pytest.raises(ExportError, match="built without kernels for CUDA; with nvcc on the PATH, build it"):
        operators.operators_library(CUDA)


def test_what_is_used_where(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    monkeypatch.setattr(operators, "_has_cuda", lambda path: True)
    asked = (None, True, False)
    assert [operators.choose_operators(one, CUDA) for one in asked] == [True, True, False]
    assert [operators.choose_operators(one, CPU) for one in asked] == [False, True, False]


def test_an_export_for_cuda_uses_them(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: Path
) -> None:
    monkeypatch.setattr(operators, "_has_cuda", lambda path: True)
    result = export_onnx(small(), tmp_path / "out", dtype=torch.float16)
    assert result.checked_on == f"{CUDA}, in a CUDA graph"
    assert read_manifest(tmp_path / "out").custom_ops
    decoder = load(tmp_path / "out")
    assert isinstance(decoder, Decoder)
    assert decoder.session.cuda_graph
    plain = export_onnx(small(), tmp_path / "plain", dtype=torch.float16, custom_ops=False)
    assert not read_manifest(plain.directory).custom_ops


@pytest.mark.usefixtures("library")
def test_a_model_without_a_lora_needs_no_library(tmp_path: Path) -> None:
    export_onnx(small("base"), tmp_path / "out", custom_ops=True)
    assert not read_manifest(tmp_path / "out").custom_ops
    assert not list((tmp_path / "out").glob("*.so"))


@pytest.mark.usefixtures("library")
def test_only_decoders_can_have_them(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="custom_ops is for target 'decoder'"):
        export_onnx(small(), tmp_path / "out", target="general", custom_ops=True)


def test_session_options_of_a_caller(written: Path) -> None:
    """ONNX Runtime takes a library once: they may be used again."""
    options = onnxruntime.SessionOptions()
    found = [load(written, session_options=options) for _ in range(2)]
    logits = [decoder(IDS) for decoder in found if isinstance(decoder, Decoder)]
    assert torch.equal(*logits)


def test_tuning_needs_cuda(written: Path) -> None:
    with pytest.raises(ExportError, match="tune_gemms needs the CUDAExecutionProvider"):
        load(written, tune_gemms=True)


def test_tuning_is_asked_of_onnx_runtime(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, written: Path) -> None:
    monkeypatch.setattr(operators, "_has_cuda", lambda path: True)
    options = onnxruntime.SessionOptions()
    decoder = load(written, tune_gemms=True, session_options=options)
    assert isinstance(decoder, Decoder)
    assert decoder.session.cuda_graph
    assert options.get_session_config_entry("ep.cuda.enable_gemm_auto_tune") == "1"
    assert decoder(IDS).shape[:2] == (1, 4)


def test_a_graph_that_cannot_be_read_is_left_to_onnx_runtime(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    assert not operators.needs_operators(tmp_path / "model.onnx")


def test_the_command_that_builds_is_the_package_s() -> None:
    assert flora_ort.BUILD in operators._HOW
