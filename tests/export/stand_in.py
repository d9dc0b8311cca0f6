"""A GPU that is not there: ONNX Runtime says that it runs on CUDA, and what it returns is no tensor of the CPU.

The graphs run on the CPU. What is modelled is what CUDA forbids: tensors of two devices in one operation, reading
memory from the CPU, a run that begins before torch has written its inputs, a CUDA graph at other addresses.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import onnxruntime
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from flora_fx.export.run import buffer, session

__all__ = ["CUDA", "FakeCuda", "Forbidden", "Foreign"]

CUDA = "CUDAExecutionProvider"
_DEVICE = (
    "meta"  # what a foreign tensor calls itself: with a device that this torch has no backend for, its guards fail
)
_MIXED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
_WITH_CPU_INDICES = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class Forbidden(BaseException):
    """What on CUDA would be wrong numbers and no error; no Exception, so that nothing takes it for a failed run."""


# --- tensors ----------------------------------------------------------------------------------------------


class Foreign(Tensor):
    """A tensor of another device than the CPU, which holds its numbers on the CPU.

    Args:
        held: the numbers.
        memory: that they are in, where ONNX Runtime has it too.
    """

    held: Tensor
    memory: Memory | None

    @staticmethod
    def __new__(cls, held: Tensor, memory: Memory | None = None) -> Foreign:
        """A wrapper around a tensor on the CPU."""
        found: Foreign = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=_DEVICE
        )
        return found

    def __init__(self, held: Tensor, memory: Memory | None = None) -> None:
        self.held = held
        self.memory = memory

    def __repr__(self, **_: Any) -> str:
        return f"Foreign({self.held})"

    def item(self) -> Any:
        """Waits for the device, as on CUDA."""
        return self.held.item()

    def tolist(self) -> Any:
        """Waits for the device, as on CUDA."""
        return self.held.tolist()

    def __bool__(self) -> bool:
        return bool(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def __float__(self) -> float:
        return float(self.held)

    def data_ptr(self) -> int:
        """Where ONNX Runtime has it."""
        assert self.memory is not None
        return self.memory.address + self.storage_offset() * self.element_size()

    def numpy(self, **_: Any) -> NoReturn:
        """As on CUDA."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on what is held, if CUDA would."""
        kwargs = dict(kwargs or {})
        _forbid_mixed(func, args, kwargs)
        foreign = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Foreign)]
        goes_to = kwargs.get("device")
        stays = torch.device(goes_to or _DEVICE).type == _DEVICE and not _onto_cpu(func, args)
        if goes_to is not None:
            kwargs["device"] = "cpu"  # where the numbers are held
        result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        for value in _written(func, args, kwargs):
            if isinstance(value, Foreign) and value.memory is not None:
                value.memory.pending = True
        return tree_map(lambda found: _wrapped(found, foreign) if stays else _same(found, foreign), result)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Foreign) else value


def _same(found: Any, foreign: Sequence[Foreign]) -> Any:
    """What was given, where that is returned."""
    return next((given for given in foreign if given.held is found), found)


def _wrapped(found: Any, foreign: Sequence[Foreign]) -> Any:
    if not isinstance(found, Tensor) or isinstance(known := _same(found, foreign), Foreign):
        return found if not isinstance(found, Tensor) else known
    storage = found.untyped_storage().data_ptr()
    shared = (given.memory for given in foreign if given.held.untyped_storage().data_ptr() == storage)
    return Foreign(found, next(shared, None))


def _onto_cpu(func: Any, args: Any) -> bool:
    return func is torch.ops.aten.copy_.default and not isinstance(args[0], Foreign)


def _forbid_mixed(func: Any, args: Any, kwargs: Any) -> None:
    if func is torch.ops.aten.copy_.default:
        return
    if func in _WITH_CPU_INDICES and isinstance(args[0], Foreign):
        args = (args[0], *args[2:])  # indices may be on either
    plain = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and not isinstance(leaf, Foreign)]
    if any(tensor.dim() for tensor in plain):
        raise RuntimeError(f"{_MIXED} (in {func})")


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[place] if place < len(args) else kwargs.get(argument.name)


class _Placed(TorchFunctionMode):
    """What is asked for on the device of a foreign tensor is foreign, as in ``x.to(foreign.device)``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def is_foreign(value: Any) -> bool:
            return isinstance(value, torch.device) and value.type == _DEVICE

        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(map(is_foreign, leaves)) or any(isinstance(leaf, Foreign) for leaf in leaves):
            return func(*args, **kwargs)
        at_home = tree_map(lambda value: torch.device("cpu") if is_foreign(value) else value, (args, kwargs))
        return Foreign(func(*at_home[0], **at_home[1]).clone())


# --- memory -----------------------------------------------------------------------------------------------


class Memory:
    """Bytes of a `Buffer`: as torch's stream left them, and as ONNX Runtime sees them.

    Args:
        size: in bytes.

    Attributes:
        pending: torch wrote, and nobody has waited for it.
        address: of what ONNX Runtime sees.
    """

    def __init__(self, size: int) -> None:
        self.ours = torch.zeros(size, dtype=torch.uint8)
        self.pending = True
        self._theirs = torch.full((size,), 0xFF, dtype=torch.uint8)  # NaN, before it is written
        self.address = self._theirs.data_ptr()

    def publish(self) -> None:
        """Torch has written."""
        self._theirs.copy_(self.ours)
        self.pending = False

    def fetch(self) -> None:
        """ONNX Runtime has run."""
        self.ours.copy_(self._theirs)


# --- ONNX Runtime -----------------------------------------------------------------------------------------


class FakeCuda:
    """ONNX Runtime with a CUDA provider, and a torch that reaches its memory.

    Args:
        refuses: why ONNX Runtime captures no graph as a session is made; None if it does.
        breaks: why it fails as a run is captured.

    Attributes:
        runs: the CUDA graph of each run, as ONNX Runtime was told: -1 for none, None where graphs are off.
        devices: of all memory that was asked for.
        sessions: how many were made, and ``together`` how many of them there were at once.
    """

    def __init__(self, *, refuses: str | None = None, breaks: str | None = None) -> None:
        self.refuses, self.breaks = refuses, breaks
        self.runs: list[str | None] = []
        self.devices: set[torch.device] = set()
        self.sessions = self.together = 0
        self.alive: weakref.WeakSet[_Session] = weakref.WeakSet()
        self.memories: weakref.WeakSet[Memory] = weakref.WeakSet()

    @contextmanager
    def installed(self) -> Iterator[FakeCuda]:
        """While sessions are made and run."""
        with pytest.MonkeyPatch.context() as patch, _Placed():
            for module in (buffer, session):
                patch.setattr(module, "reachable", lambda device: True)
            patch.setattr(buffer, "_zeros", self._zeros)
            patch.setattr(buffer, "_wait", lambda written: self._publish())
            in_place = session._in_place
            patch.setattr(session, "_in_place", lambda value: Foreign(in_place(value)))
            patch.setattr(session, "_has_cuda_driver", lambda: True)
            patch.setattr(session, "require", lambda module, extra: _OnnxRuntime(self))
            yield self

    def _zeros(self, size: int, device: torch.device) -> Tensor:
        if device.type == "cpu":
            return torch.zeros(size, dtype=torch.uint8)
        self.devices.add(device)
        memory = Memory(size)
        self.memories.add(memory)
        return Foreign(memory.ours, memory)

    def _publish(self) -> None:
        for memory in self.memories:  # a stream is waited for as a whole
            if memory.pending:
                memory.publish()


class _OnnxRuntime:
    """The module."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.SessionOptions, self.RunOptions = onnxruntime.SessionOptions, onnxruntime.RunOptions
        self.OrtValue = _OrtValue

    def get_available_providers(self) -> list[str]:
        return [CUDA, "CPUExecutionProvider"]

    def InferenceSession(self, path: str, *, sess_options: Any, providers: Sequence[Any]) -> Any:  # noqa: N802
        (first, options), *_ = [p if isinstance(p, tuple) else (p, {}) for p in providers]
        if first != CUDA:
            return onnxruntime.InferenceSession(path, sess_options=sess_options, providers=providers)
        return _Session(self._cuda, path, sess_options, captures=options.get("enable_cuda_graph") == "1")


class _OrtValue:
    """Those on "cuda" are on the CPU."""

    ortvalue_from_numpy = onnxruntime.OrtValue.ortvalue_from_numpy
    ortvalue_from_numpy_with_onnx_type = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type

    @staticmethod
    def ortvalue_from_shape_and_type(shape: Sequence[int], element: int, *_: Any) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, element, "cpu")


class _Session:
    """An ``InferenceSession`` on CUDA."""

    def __init__(self, cuda: FakeCuda, path: str, options: Any, *, captures: bool) -> None:
        if captures and cuda.refuses is not None:
            raise Fail(cuda.refuses)
        self._real = onnxruntime.InferenceSession(path, sess_options=options, providers=["CPUExecutionProvider"])
        self._cuda = cuda
        self._captures = captures
        self._captured: dict[str, dict[str, Any]] = {}
        cuda.alive.add(self)
        cuda.sessions += 1
        cuda.together = max(cuda.together, len(cuda.alive))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_providers(self) -> list[str]:
        return [CUDA, "CPUExecutionProvider"]

    def io_binding(self) -> _Binding:
        return _Binding(self._real)

    def run_with_iobinding(self, binding: _Binding, options: Any = None) -> None:
        """Run, or capture and replay as CUDA graphs are."""
        graph = self._graph(options) if self._captures else None
        self._cuda.runs.append(graph)
        memories = [memory for memory in self._cuda.memories if memory.address in binding.addresses]
        if any(memory.pending for memory in memories):
            raise Forbidden("a run began before torch had written its inputs")
        times = 1
        if graph not in (None, "-1"):
            if graph not in self._captured:
                if self._cuda.breaks is not None:
                    raise Fail(self._cuda.breaks)
                self._captured[graph] = dict(binding.places)
                times = 2  # once before it is captured
            elif self._captured[graph] != binding.places:
                raise Forbidden(f"CUDA graph {graph} was captured at {self._captured[graph]}, not at {binding.places}")
        for _ in range(times):
            self._real.run_with_iobinding(binding.real, options)
        for memory in memories:
            memory.fetch()

    @staticmethod
    def _graph(options: Any) -> str:
        try:
            return str(options.get_run_config_entry("gpu_graph_id"))
        except Exception:  # not told: ONNX Runtime's own number
            return "0"


class _Binding:
    """An ``IOBinding`` whose "cuda" is the CPU.

    Attributes:
        places: what is bound where, by name.
        addresses: of all that has one.
    """

    def __init__(self, real: Any) -> None:
        self.real = real.io_binding()
        self.places: dict[str, Any] = {}

    @property
    def addresses(self) -> set[int]:
        return {place[-1] for place in self.places.values() if isinstance(place, tuple)}

    def bind_input(self, name: str, device: str, index: int, element: int, shape: Sequence[int], address: int) -> None:
        self.places[name] = (tuple(shape), address)
        self.real.bind_input(name, "cpu", 0, element, shape, address)

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.places[name] = value
        self.real.bind_ortvalue_input(name, value)

    def bind_output(self, name: str, device: str = "cpu", index: int = 0, *fixed: Any) -> None:
        if fixed:
            _, shape, address = fixed
            self.places[name] = (tuple(shape), address)
            self.real.bind_output(name, "cpu", 0, *fixed)
        else:
            self.places[name] = object()  # anywhere
            self.real.bind_output(name, "cpu")

    def get_outputs(self) -> Any:
        return self.real.get_outputs()
