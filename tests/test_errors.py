"""The core needs torch alone; what else is missing says which extra brings it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import flora_fx
from flora_fx.errors import FloraError, MissingExtraError, require


def test_every_error_is_public() -> None:
    for package in ("flora_fx", "flora_fx.checkpoint", "flora_fx.export", "flora_fx.adapters"):
        importlib.import_module(package)
    pending, errors = [FloraError], []
    while pending:
        errors.append(pending.pop())
        pending += errors[-1].__subclasses__()
    ours = [error for error in errors if error.__module__.startswith("flora_fx") and not error.__name__.startswith("_")]
    assert {error.__name__ for error in ours if getattr(flora_fx, error.__name__, None) is not error} == set()
    assert len(ours) == 7


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"'no_such_module' is needed.*pip install 'flora-fx\[onnx\]'"):
        require("no_such_module", "onnx")
    assert issubclass(MissingExtraError, ImportError)
    assert issubclass(MissingExtraError, FloraError)


def test_an_error_inside_an_installed_package_is_not_disguised(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "half_installed.py").write_text("import its_own_missing_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"its_own_missing_dependency") as found:
        require("half_installed", "onnx")
    assert not isinstance(found.value, MissingExtraError)


def test_importing_and_fusing_needs_torch_alone() -> None:
    """Everything optional is made unimportable, as on a machine that has torch and nothing else."""
    program = """
import sys
for name in ("transformers", "peft", "onnx", "onnxscript", "onnxruntime", "rich", "typer", "matplotlib", "safetensors"):
    sys.modules[name] = None
import torch, flora_fx, flora_fx.export
linear = torch.nn.Sequential(torch.nn.Linear(3, 2)).requires_grad_(False)
fused = flora_fx.fuse(flora_fx.capture(linear, torch.ones(1, 3)))
print(flora_fx.report(fused), flora_fx.verify(linear, fused, torch.ones(1, 3)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 adapters fused" in done.stdout
