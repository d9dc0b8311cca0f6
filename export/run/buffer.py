"""Memory for ONNX Runtime at an address that stays."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from flora_fx.errors import require

__all__ = ["Buffer", "reachable"]


def reachable(device: str) -> bool:
    """Whether torch can read the memory of ``"cpu"`` or ``"cuda"``: a torch without CUDA cannot, ONNX Runtime may."""
    return device == "cpu" or torch.cuda.is_available()


class Buffer:
    """Zeroed bytes on a device.

    Args:
        size: in bytes.
        device: ``"cpu"`` or ``"cuda"``.
        index: of the device, where there are several.

    Attributes:
        address: for ONNX Runtime.

    >>> buffer = Buffer(32, "cpu")
    >>> buffer.host((2, 2), torch.int64).data_ptr() == buffer.address  # on the CPU it is the memory itself
    True
    """

    def __init__(self, size: int, device: str, index: int = 0) -> None:
        self._size = size
        self._bytes: Tensor | None = None
        self._value: Any = None
        if reachable(device):
            self._bytes = _zeros(size, torch.device(device, index))
            self.address: int = self._bytes.data_ptr()
            _wait(self._bytes)
        else:
            ort = require("onnxruntime", "onnx")
            zeros = torch.zeros(size, dtype=torch.uint8).numpy()
            self._value = ort.OrtValue.ortvalue_from_numpy(zeros, device, index)
            self.address = self._value.data_ptr()

    def __len__(self) -> int:
        return self._size

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The first bytes as a tensor on the CPU; `upload` after writing to it."""
        return _shaped(self._mirror, shape, dtype)

    def nearest(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The first bytes as a tensor on the device, where torch can reach that; else `download` before reading."""
        return _shaped(self._mirror if self._bytes is None else self._bytes, shape, dtype)

    def upload(self) -> None:
        """Copy to the device what was written to `host` tensors."""
        if self._value is not None:
            self._value.update_inplace(self._mirror.numpy())
        elif self._bytes is not None and self._bytes is not self._mirror:
            self._bytes.copy_(self._mirror)
            _wait(self._bytes)

    def flush(self) -> None:
        """Let ONNX Runtime see what was written to `nearest` tensors."""
        if self._value is not None:
            self.upload()
        elif self._bytes is not None:
            _wait(self._bytes)

    def download(self) -> None:
        """Copy from the device what `nearest` tensors show, where those are on the CPU."""
        if self._value is not None:
            self._mirror.copy_(torch.from_numpy(self._value.numpy()))

    @functools.cached_property
    def _mirror(self) -> Tensor:
        if self._bytes is not None and self._bytes.device.type == "cpu":
            return self._bytes
        return torch.zeros(self._size, dtype=torch.uint8)


def _zeros(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8, device=device)


def _wait(written: Tensor) -> None:
    """Until torch has written it: ONNX Runtime has a stream of its own."""
    if written.is_cuda:
        torch.cuda.current_stream(written.device).synchronize()


def _shaped(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return memory[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
