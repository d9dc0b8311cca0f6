"""Where the tests of this folder run: on the CPU everywhere, which keeps them right, and on a GPU that is there."""

from __future__ import annotations

import pytest
import torch

from benchmarks.contenders.settings import Settings

__all__ = ["CUDA", "DEVICES", "PROVIDERS", "on_gpu", "settings", "tokens"]

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", CUDA]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def on_gpu(*values: object) -> object:
    """Parameters of a test that are for a GPU alone."""
    return pytest.param(*values, marks=pytest.mark.gpu)


def settings(device: str, dtype: str = "float32", layers: int = 2) -> Settings:
    """A small Llama with a LoRA on all seven projections."""
    return Settings(shape="tiny", layers=layers, rank=4, dtype=dtype, device=device, batch=2)


def tokens(device: str, length: int = 7) -> torch.Tensor:
    """Two prompts."""
    return torch.randint(128, (2, length), generator=torch.Generator().manual_seed(1)).to(device)
