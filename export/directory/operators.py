"""``flora_ort``, the library of ONNX Runtime operators that a graph may need: is it here, and let a session have it."""

from __future__ import annotations

import ctypes
import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import flora_fx
from flora_fx.errors import ExportError, require

__all__ = [
    "DOMAIN",
    "MOST_ADAPTERS",
    "choose_operators",
    "copy_operators",
    "needs_operators",
    "operators_library",
    "register_operators",
]

DOMAIN = "flora_ort"
"""Of the operators, and the name of the package that has them."""

MOST_ADAPTERS = 50
"""Among which rows may choose: an operator has room for that many where five projections are one pack."""

_CUDA = "CUDAExecutionProvider"
_REGISTERED = "flora_ort.registered"
"""An entry of the configuration of a session: ONNX Runtime takes a library once."""

_HOW = (
    "build it by `make ops` in a checkout of flora_fx (`python -m flora_ort.build` where the package flora_ort is "
    "installed), or name a built one in the environment variable FLORA_ORT_LIBRARY"
)


def choose_operators(asked: bool | None, provider: str, adapters: int = 1) -> bool:
    """Whether an export is to use the operators.

    Args:
        asked: None: where they are measured to be faster, on CUDA, and the library is here.
        provider: ONNX Runtime's name of the execution provider that the export is for.
        adapters: among which rows choose; the operators have `MOST_ADAPTERS` at most.

    Raises:
        ExportError: they are asked for, and are not here, or do not have so many adapters.
    """
    if adapters > MOST_ADAPTERS and asked:
        raise ExportError(
            f"custom_ops is for at most {MOST_ADAPTERS} adapters, and there are places for {adapters}; leave it out, "
            "or take fewer"
        )
    if asked is not None:
        return asked and bool(operators_library(provider))
    if provider != _CUDA or adapters > MOST_ADAPTERS:
        return False
    try:
        return bool(operators_library(provider))
    except ExportError:
        return False


def operators_library(provider: str) -> Path:
    """The library, with kernels for a provider.

    Raises:
        ExportError: it is not here, or was built without CUDA.
    """
    try:
        found: Path = _package().library()
    except FileNotFoundError as error:
        raise ExportError(f"the operators of flora_ort are needed, and there is {error.args[0]}") from error
    except ModuleNotFoundError as error:
        raise ExportError(f"the operators of flora_ort are needed, and there is no library of them; {_HOW}") from error
    if provider == _CUDA and not _has_cuda(found):
        raise ExportError(f"{found} was built without kernels for CUDA; with nvcc on the PATH, {_HOW}")
    return found


def needs_operators(path: Path) -> bool:
    """Whether a graph has some of the operators; not where it cannot be read, which ONNX Runtime will say.

    Args:
        path: of the ``.onnx`` file.
    """
    onnx = require("onnx", "onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # protobuf's own exceptions are not public
        return False
    return any(imported.domain == DOMAIN for imported in model.opset_import)


def register_operators(options: Any, provider: str) -> None:
    """Let a session have the operators, unless it has them.

    Args:
        options: ``onnxruntime.SessionOptions``; changed in place.
        provider: that it is to run on.

    Raises:
        ExportError: they are not here.
    """
    try:
        options.get_session_config_entry(_REGISTERED)
    except Exception:  # ONNX Runtime's own, for an entry that is not there
        options.register_custom_ops_library(str(operators_library(provider)))
        options.add_session_config_entry(_REGISTERED, "1")


def copy_operators(place: Path, provider: str) -> str:
    """Put the library beside a graph, where onnxruntime-genai may load it from. `load` never does: a directory of
    weights is no reason to run code.

    Returns:
        the name of its file.

    Raises:
        ExportError: it is not here.
    """
    found = operators_library(provider)
    shutil.copyfile(found, place / found.name)
    return found.name


def _package() -> Any:
    """As it is installed, or beside the other folders of a checkout."""
    try:
        return importlib.import_module(DOMAIN)
    except ModuleNotFoundError:
        beside = Path(flora_fx.__file__).parents[1]
        if not (beside / DOMAIN / "__init__.py").is_file():
            raise
        sys.path.append(str(beside))
        try:
            return importlib.import_module(DOMAIN)
        finally:
            sys.path.remove(str(beside))


def _has_cuda(path: Path) -> bool:
    return bool(ctypes.CDLL(str(path)).flora_ort_has_cuda())
