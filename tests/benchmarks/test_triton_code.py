"""What is counted computes the right thing: Inductor's kernels compile for GPUs, and run in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.patience import LIMIT_S

from .triton_code import WIDTH, Block, binary, kernels, written

triton = pytest.importorskip("triton", reason="triton is not installed here")


def test_kernels_with_unrolled_sums_compile_for_gpus() -> None:
    code, _ = written(Block().bfloat16().requires_grad_(False), torch.randn(2, 5, WIDTH, dtype=torch.bfloat16))
    found = kernels(code)
    assert len(found) == 2  # silu · up, and the residual with the norm
    assert "addmm" not in code
    for name, text in found.items():
        for capability in (80, 90):
            assert binary(name, text, capability).startswith(b"\x7fELF")


def test_kernels_with_unrolled_sums_compute_what_the_model_computes() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.triton_code"]
    root = Path(__file__).parents[2]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment, cwd=root, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-5
