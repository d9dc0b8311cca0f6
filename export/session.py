"""ONNX Runtime sessions, and tensors in and out of them."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora_fx.errors import ExportError, require

__all__ = ["DEFAULT_PROVIDERS", "Session", "Value", "usable_providers"]

DEFAULT_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")

Value = Any
"""An ``onnxruntime.OrtValue``: a tensor that stays on the session's device."""

_ELEMENT_TYPES = {  # onnx.TensorProto.DataType
    "tensor(float)": (1, torch.float32),
    "tensor(uint8)": (2, torch.uint8),
    "tensor(int32)": (6, torch.int32),
    "tensor(int64)": (7, torch.int64),
    "tensor(bool)": (9, torch.bool),
    "tensor(float16)": (10, torch.float16),
    "tensor(double)": (11, torch.float64),
    "tensor(bfloat16)": (16, torch.bfloat16),
}


def usable_providers(wanted: Sequence[Any] | None = None) -> list[Any]:
    """Those of the execution providers asked for that this machine can use, in the same order.

    Args:
        wanted: names or (name, options) pairs; None for `DEFAULT_PROVIDERS`.

    Raises:
        ExportError: none of them is usable.
    """
    ort = require("onnxruntime", "onnx")
    available = set(ort.get_available_providers())
    if "CUDAExecutionProvider" in available and not _has_cuda_driver():
        available.discard("CUDAExecutionProvider")  # the GPU build lists it on any machine
    # TF32 is off in torch too, unless asked for.
    named: list[Any] = [
        (provider, {"use_tf32": "0"}) if provider == "CUDAExecutionProvider" else provider
        for provider in (DEFAULT_PROVIDERS if wanted is None else wanted)
    ]
    usable = [provider for provider in named if _name(provider) in available]
    if not usable:
        raise ExportError(
            f"none of the providers {', '.join(_name(p) for p in named) or '(none given)'} can be used here; "
            f"this machine has {', '.join(sorted(available))}"
        )
    return usable


def _name(provider: Any) -> str:
    return provider if isinstance(provider, str) else str(provider[0])


def _has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


class Session:
    """One graph on ONNX Runtime; all that is private or awkward in its Python face is in here.

    Args:
        path: of the ``.onnx`` file.
        providers: as for `usable_providers`.
        session_options: ``onnxruntime.SessionOptions``; None for quiet defaults.

    Raises:
        ExportError: ONNX Runtime cannot load the graph, or lacks kernels for its dtype.
    """

    def __init__(self, path: Path, *, providers: Sequence[Any] | None = None, session_options: Any = None) -> None:
        ort = require("onnxruntime", "onnx")
        self._ort = ort
        chosen = usable_providers(providers)
        if any(_name(provider) == "CUDAExecutionProvider" for provider in chosen) and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA's libraries from pip packages
        if session_options is None:
            session_options = ort.SessionOptions()
            session_options.log_severity_level = 3  # errors; warnings are about nodes kept on the CPU
        try:
            self._session = ort.InferenceSession(str(path), sess_options=session_options, providers=chosen)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ExportError(f"ONNX Runtime cannot load {path}: {_one_line(error)}") from error
        self.provider: str = self._session.get_providers()[0]
        self.device = "cuda" if self.provider == "CUDAExecutionProvider" else "cpu"
        self.inputs: dict[str, tuple[tuple[int | str, ...], torch.dtype]] = {
            value.name: (tuple(value.shape), _ELEMENT_TYPES[value.type][1]) for value in self._session.get_inputs()
        }
        self._element = {value.name: _ELEMENT_TYPES[value.type][0] for value in self._session.get_inputs()}
        self.outputs: list[str] = [value.name for value in self._session.get_outputs()]

    def empty(self, name: str, sizes: dict[str, int]) -> Value:
        """An uninitialised tensor in the shape of an input, on the session's device.

        Args:
            name: of the input.
            sizes: of its dynamic axes.
        """
        shape = [size if isinstance(size, int) else sizes[size] for size in self.inputs[name][0]]
        return self._ort.OrtValue.ortvalue_from_shape_and_type(shape, self._element[name], self.device)

    def run(self, inputs: dict[str, Tensor | Value], *, keep: Sequence[str] = ()) -> dict[str, Value]:
        """Run the graph.

        Args:
            inputs: torch tensors or earlier outputs, by name.
            keep: outputs to leave on the device, as values for the next run; all others come as torch tensors.

        Raises:
            ExportError: ONNX Runtime fails.
        """
        binding = self._session.io_binding()
        kept = set(keep)
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, self._value(name, value) if isinstance(value, Tensor) else value)
        for name in self.outputs:
            binding.bind_output(name, self.device if name in kept else "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            shapes = {name: list(v.shape) for name, v in inputs.items() if isinstance(v, Tensor)}
            raise ExportError(f"ONNX Runtime failed on inputs {shapes}: {_one_line(error)}") from error
        values = zip(self.outputs, binding.get_outputs(), strict=True)
        return {name: value if name in kept else _tensor(value) for name, value in values}

    def _value(self, name: str, tensor: Tensor) -> Value:
        tensor = tensor.detach().to("cpu").contiguous()
        make = self._ort.OrtValue
        if tensor.dtype == torch.bfloat16:  # numpy has none
            return make.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.uint16).numpy(), self._element[name])
        return make.ortvalue_from_numpy(tensor.numpy())


def _tensor(value: Value) -> Tensor:
    if value.data_type() == "tensor(bfloat16)":
        # As torch.onnx does it (torch 2.13); numpy has no bfloat16.
        return torch.utils.dlpack.from_dlpack(value._get_c_value()).clone()
    return torch.from_numpy(value.numpy())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
