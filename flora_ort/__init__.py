"""Operators of ONNX Runtime for unmerged LoRA: LoraAdd, LoraSwiGLU, LoraSkipRMSNorm, and SkinnyMatMul for few rows.

>>> import onnxruntime, flora_ort  # doctest: +SKIP
>>> options = onnxruntime.SessionOptions()  # doctest: +SKIP
>>> options.register_custom_ops_library(str(flora_ort.library()))  # doctest: +SKIP
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["BUILD", "library"]

BUILD = "python -m flora_ort.build"
"""The command that builds the library, in a checkout's folder or where the package is installed."""

_NAME = "libflora_ort.so"


def library() -> Path:
    """Where the library is: what ``FLORA_ORT_LIBRARY`` names, or else beside this file.

    Raises:
        FileNotFoundError: it is not there.
    """
    told = os.environ.get("FLORA_ORT_LIBRARY")
    path = Path(told) if told else Path(__file__).parent / _NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; build it: {BUILD}")
    return path.absolute()
