"""The library's functions, and sessions that have it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import onnxruntime
import pytest


@pytest.fixture(scope="session")
def code(library: Path) -> ctypes.CDLL:
    """Its functions."""
    return ctypes.CDLL(str(library))


@pytest.fixture
def options(library: Path) -> Any:
    """Of sessions that have the operators."""
    found = onnxruntime.SessionOptions()
    found.log_severity_level = 3
    found.intra_op_num_threads = 2
    found.register_custom_ops_library(str(library))
    return found
