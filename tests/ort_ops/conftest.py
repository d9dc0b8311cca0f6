"""The library, built once where there is a compiler."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import flora_ort
from flora_ort.build import NoCompilerError, build


@pytest.fixture(scope="session")
def library() -> Path:
    """As it is here, or else built without CUDA, which takes long."""
    try:
        return flora_ort.library()
    except FileNotFoundError:
        try:
            return build(cuda=False)
        except NoCompilerError as error:
            pytest.skip(f"the operators are not tested: {error}")


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
