"""`make compat` tests the installed wheel, and the wheel holds all of the package."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import flora_fx

SOURCE = os.environ.get("FLORA_FX_SOURCE")
pytestmark = pytest.mark.skipif(SOURCE is None, reason="`make compat` runs it where the wheel is installed")

SITE = Path(flora_fx.__file__).parent


def test_what_is_imported_is_what_was_installed() -> None:
    assert SITE.is_relative_to(sys.prefix)
    assert not SITE.is_relative_to(str(SOURCE))
    for module in ("passes", "ops"):
        assert Path(str(importlib.import_module(f"flora_fx.{module}").__file__)).is_relative_to(SITE)


def test_the_wheel_holds_every_module_and_the_mark_of_its_types() -> None:
    source = Path(str(SOURCE))
    modules = [Path("flora_fx/py.typed"), *(path.relative_to(source) for path in (source / "flora_fx").rglob("*.py"))]
    for folder in ("passes", "export"):
        modules += [Path("flora_fx") / path.relative_to(source) for path in (source / folder).rglob("*.py")]
    assert len(modules) > 100
    assert [module for module in modules if not (SITE.parent / module).is_file()] == []


def test_torch_alone_fuses() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.a, self.b = nn.Linear(12, 8), nn.Linear(12, 3, bias=False), nn.Linear(3, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.base(x) + 0.5 * self.b(self.a(x))
            return found

    model = Adapted().double().eval()
    x = torch.randn(5, 12, dtype=torch.float64)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    assert flora_fx.report(fused).ops_after["gemm"] == 2
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)


def test_benchmarks_are_a_checkouts() -> None:
    assert not (SITE / "benchmarks").exists()
    assert not (SITE.parent / "benchmarks").exists()


def test_bench_without_a_checkout_says_where_to_run_it() -> None:
    pytest.importorskip("typer")
    command = [sys.executable, "-m", "flora_fx.cli", "bench"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "run `python -m benchmarks latency` in a checkout" in done.stderr
