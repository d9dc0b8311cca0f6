"""ONNX Runtime sessions, and tensors in and out of them."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora_fx.errors import ExportError, require

from ..directory.operators import needs_operators, register_operators
from .buffer import Buffer, reachable
from .one_thread import OneThread

__all__ = ["DEFAULT_PROVIDERS", "Binding", "Session", "Value", "provider_name", "usable_providers"]

_CUDA = "CUDAExecutionProvider"
_TUNE = "ep.cuda.enable_gemm_auto_tune"
DEFAULT_PROVIDERS = (_CUDA, "CPUExecutionProvider")

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
        ExportError: none of them is usable; or an option ``enable_cuda_graph``, see `Session`.
    """
    ort = require("onnxruntime", "onnx")
    available = set(ort.get_available_providers())
    if _CUDA in available and not _has_cuda_driver():
        available.discard(_CUDA)  # the GPU build lists it on any machine
    # TF32 is off in torch too, unless asked for.
    named: list[Any] = [
        (provider, {"use_tf32": "0"}) if provider == _CUDA else provider
        for provider in (DEFAULT_PROVIDERS if wanted is None else wanted)
    ]
    if any("enable_cuda_graph" in _options(provider) for provider in named):
        raise ExportError(
            "enable_cuda_graph would capture the prompt, and replay it for every token; leave it out of the providers' "
            "options, and pass cuda_graph=True or False to load"
        )
    usable = [provider for provider in named if provider_name(provider) in available]
    if not usable:
        raise ExportError(
            f"none of the providers {', '.join(provider_name(p) for p in named) or '(none given)'} can be used here; "
            f"this machine has {', '.join(sorted(available))}"
        )
    return usable


def provider_name(provider: Any) -> str:
    """The name in a name, or in a (name, options) pair."""
    return provider if isinstance(provider, str) else str(provider[0])


def _options(provider: Any) -> dict[str, Any]:
    return {} if isinstance(provider, str) else dict(provider[1])


def _with_cuda_graph(provider: Any) -> Any:
    if provider_name(provider) != _CUDA:
        return provider
    return _CUDA, {**_options(provider), "enable_cuda_graph": "1"}


def _has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


class Session:
    """One graph on ONNX Runtime. Whatever is private or awkward in its Python API is used here alone.

    Args:
        path: of the ``.onnx`` file.
        providers: as for `usable_providers`.
        session_options: ``onnxruntime.SessionOptions``; None for quiet defaults. A graph in operators of ``flora_ort``
            has that library registered in them.
        cuda_graph: let a `Binding` capture its run as a CUDA graph, and replay it; from how many threads ever, two run.
        tune_gemms: let ONNX Runtime try its kernels for GEMMs of few rows on CUDA, each size as it first comes, and
            take the fastest.

    Attributes:
        path: of the graph.
        provider: the first execution provider; ``device``, ``"cpu"`` or ``"cuda"``, is where it computes, and
            ``device_id`` which of several.
        inputs: their shapes, with names for dynamic axes, and dtypes.
        outputs: their names.
        signature: shapes and dtypes of both, and of the initializers that may be overridden.

    Raises:
        ExportError: ONNX Runtime cannot load the graph, or lacks kernels for its dtype; ``flora_ort`` is needed and not
            here; ``cuda_graph`` or ``tune_gemms`` without CUDA.
    """

    def __init__(
        self,
        path: Path,
        *,
        providers: Sequence[Any] | None = None,
        session_options: Any = None,
        cuda_graph: bool = False,
        tune_gemms: bool = False,
    ) -> None:
        ort = require("onnxruntime", "onnx")
        self._ort = ort
        chosen = usable_providers(providers)
        if cuda_graph:
            chosen = [_with_cuda_graph(provider) for provider in chosen]
        if any(provider_name(provider) == _CUDA for provider in chosen) and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA's libraries from pip packages
        if session_options is None:
            session_options = ort.SessionOptions()
            session_options.log_severity_level = 3  # errors; warnings are about nodes kept on the CPU
        if tune_gemms:
            session_options.add_session_config_entry(_TUNE, "1")
        if needs_operators(path):
            register_operators(session_options, provider_name(chosen[0]))
        try:
            self._session = ort.InferenceSession(str(path), sess_options=session_options, providers=chosen)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ExportError(f"ONNX Runtime cannot load {path}: {_one_line(error)}") from error
        self.path = path
        self.provider: str = self._session.get_providers()[0]
        self.device = "cuda" if self.provider == _CUDA else "cpu"
        told = next((_options(provider) for provider in chosen if provider_name(provider) == self.provider), {})
        self.device_id = int(told.get("device_id", 0))
        self.cuda_graph = cuda_graph
        self._thread = OneThread() if cuda_graph else None
        if cuda_graph and self.device != "cuda":
            raise ExportError(f"cuda_graph needs the CUDAExecutionProvider; {path} runs on {self.provider}")
        if tune_gemms and self.device != "cuda":
            raise ExportError(f"tune_gemms needs the CUDAExecutionProvider; {path} runs on {self.provider}")
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        values = (*inputs, *self._session.get_overridable_initializers(), *outputs)
        self.signature: dict[str, tuple[tuple[int | str, ...], torch.dtype]] = {
            value.name: (tuple(value.shape), _ELEMENT_TYPES[value.type][1]) for value in values
        }
        self.inputs = {value.name: self.signature[value.name] for value in inputs}
        self.outputs: list[str] = [value.name for value in outputs]
        self._element = {value.name: _ELEMENT_TYPES[value.type][0] for value in values}

    def empty(self, name: str, sizes: dict[str, int]) -> Value:
        """An uninitialised tensor in the shape of an input, on the session's device.

        Args:
            name: of the input.
            sizes: of its dynamic axes.
        """
        shape = [size if isinstance(size, int) else sizes[size] for size in self.inputs[name][0]]
        return self._ort.OrtValue.ortvalue_from_shape_and_type(shape, self._element[name], self.device, self.device_id)

    def buffer(self, size: int) -> Buffer:
        """So many zeroed bytes on its device."""
        return Buffer(size, self.device, self.device_id)

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
            binding.bind_output(name, *((self.device, self.device_id) if name in kept else ("cpu",)))
        try:
            self._run(binding, self._run_options(None))
        except Exception as error:
            shapes = {name: list(v.shape) for name, v in inputs.items() if isinstance(v, Tensor)}
            raise ExportError(f"ONNX Runtime failed on inputs {shapes}: {_one_line(error)}") from error
        values = zip(self.outputs, binding.get_outputs(), strict=True)
        return {name: value if name in kept else _tensor(value) for name, value in values}

    def bind(self, places: Mapping[str, tuple[Buffer, Sequence[int]]], *, graph: int | None = None) -> Binding:
        """Bind inputs and outputs to buffers, for as many runs as wanted.

        Args:
            places: by name, a buffer and the shape of what is at its beginning. An output may have the place of an
                input, where the graph allows it.
            graph: with ``cuda_graph``, a number above 0: the first run of this binding is captured under it, later
                ones replay it. None to run the graph node by node.
        """
        return Binding(self, places, graph)

    def _run(self, binding: Any, options: Any) -> None:
        if self._thread is None:
            self._session.run_with_iobinding(binding, options)
        else:
            self._thread(lambda: self._session.run_with_iobinding(binding, options))

    def _run_options(self, graph: int | None) -> Any:
        if not self.cuda_graph:
            return None
        options = self._ort.RunOptions()
        # -1: neither captured nor replayed; 0 is ONNX Runtime's own.
        options.add_run_config_entry("gpu_graph_id", "-1" if graph is None else str(graph))
        return options

    def _value(self, name: str, tensor: Tensor) -> Value:
        tensor = tensor.detach().to("cpu").contiguous()
        make = self._ort.OrtValue
        if tensor.dtype == torch.bfloat16:  # numpy has none
            return make.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.uint16).numpy(), self._element[name])
        return make.ortvalue_from_numpy(tensor.numpy())


class Binding:
    """Inputs and outputs that are bound once, for many runs. `Session.bind` makes one."""

    def __init__(self, session: Session, places: Mapping[str, tuple[Buffer, Sequence[int]]], graph: int | None) -> None:
        self._owner = session
        self._options = session._run_options(graph)
        self._binding = session._session.io_binding()
        for name, (buffer, shape) in places.items():
            bind = self._binding.bind_output if name in session.outputs else self._binding.bind_input
            bind(name, session.device, session.device_id, session._element[name], shape, buffer.address)
        self._buffers = [buffer for buffer, _ in places.values()]  # they must outlive the binding

    def run(self) -> None:
        """Run the graph on what the buffers hold.

        Raises:
            ExportError: ONNX Runtime fails.
        """
        try:
            self._owner._run(self._binding, self._options)
        except Exception as error:
            raise ExportError(f"ONNX Runtime failed: {_one_line(error)}") from error

    def run_with(self, inputs: Mapping[str, Tensor], output: str) -> Tensor:
        """Run the graph on further inputs, of any length.

        Args:
            inputs: those that have no place in a buffer.
            output: the one that has none.

        Returns:
            the output, on the session's device where torch can reach it, else on the CPU.

        Raises:
            ExportError: ONNX Runtime fails.
        """
        for name, tensor in inputs.items():
            self._binding.bind_ortvalue_input(name, self._owner._value(name, tensor))
        owner = self._owner
        place = (owner.device, owner.device_id) if reachable(owner.device) else ("cpu",)
        self._binding.bind_output(output, *place)
        self.run()
        value = self._binding.get_outputs()[-1]  # bound last, the first time
        self._binding.bind_output(output, *place)  # or the binding would keep it until the next run
        return _in_place(value)


def _tensor(value: Value) -> Tensor:
    if value.data_type() == "tensor(bfloat16)":
        return _in_place(value).clone()  # numpy has no bfloat16
    return torch.from_numpy(value.numpy())


def _in_place(value: Value) -> Tensor:
    """The same memory, wherever it is; as torch.onnx does it (torch 2.13)."""
    found: Tensor = torch.utils.dlpack.from_dlpack(value._get_c_value())
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
