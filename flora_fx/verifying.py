"""`verify`: compare a model and its fused form in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from .internals import TorchDispatchMode, pytree
from .ops import hold
from .quantized.formats.live import with_quantized_linears
from .reporting.notebook import as_html

__all__ = ["Verification", "verify"]

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Verification:
    """The difference of two programs' outputs, both computed in float64.

    Attributes:
        max_abs: the largest absolute difference over all floating-point outputs.
        max_rel: that difference over the largest magnitude of the output it is in.
        outputs: how many tensors were compared.
    """

    max_abs: float
    max_rel: float
    outputs: int

    def __repr__(self) -> str:
        return f"Verification(max_abs={self.max_abs:.1e}, max_rel={self.max_rel:.1e}, outputs={self.outputs})"

    def _repr_html_(self) -> str:
        return as_html(str(self))

    def __str__(self) -> str:
        return f"{self.outputs} outputs agree within {self.max_rel:.1e} relative ({self.max_abs:.1e} absolute), float64"


class _InFloat64(TorchDispatchMode):
    """Runs a program as if it had been written for float64: what it casts to a narrower dtype stays wide."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def widen(value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return torch.float64 if value in _NARROW else value
            return value.double() if isinstance(value, Tensor) and value.dtype in _NARROW else value

        args, kwargs = pytree.tree_map(widen, (args, kwargs or {}))
        return func(*args, **kwargs)


class _HeldToNothing(TorchFunctionMode):
    """A captured graph is not held to the dtypes that it was captured with: it runs in another one on purpose."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return None if func is hold else func(*args, **(kwargs or {}))


@torch.no_grad()
def verify(
    original: nn.Module | ExportedProgram, fused: nn.Module | ExportedProgram, *args: Any, **kwargs: Any
) -> Verification:
    """Run both programs in float64 on the same inputs and compare all they return.

    Both are copied first (one after the other), so neither changes. Quantized layers of bitsandbytes, torchao and
    compressed-tensors are compared as what they stand for: their dequantized weights, in float32.

    Args:
        original: the model or its unfused graph.
        fused: what `flora_fx.fuse` returned for it.
        args, kwargs: inputs, as both are called.

    Returns:
        the largest absolute and relative differences.

    Raises:
        ValueError: the two return different structures or shapes, or no floating-point tensor.

    >>> import torch
    >>> linear = torch.nn.Linear(3, 2)
    >>> verify(linear, copy.deepcopy(linear), torch.ones(4, 3)).max_abs
    0.0
    """
    expected, found = (_run(program, args, kwargs) for program in (original, fused))
    if len(expected) != len(found) or any(a.shape != b.shape for a, b in zip(expected, found, strict=True)):
        shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (expected, found)]
        raise ValueError(f"the two programs return different shapes: {shapes[0]} and {shapes[1]}")
    if not expected:
        raise ValueError("the programs return no floating-point tensor; there is nothing to compare")
    max_abs = max_rel = 0.0
    for a, b in zip(expected, found, strict=True):
        if not a.numel():
            continue
        # Equal infinities (masks) differ by nothing; a NaN on one side only is a difference without bound.
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf).max().item()
        scale = a[a.isfinite()].abs().max().item() if bool(a.isfinite().any()) else 1.0
        max_abs = max(max_abs, difference)
        max_rel = max(max_rel, difference / scale if scale else difference)
    return Verification(max_abs, max_rel, len(expected))


def _run(program: nn.Module | ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    module = program.module() if isinstance(program, ExportedProgram) else program
    # Layers of other libraries compute in dtypes of their own: what they stand for is what is compared.
    with warnings.catch_warnings():  # torch (2.13) warns of its own class as it copies a captured graph
        warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", FutureWarning)
        module = copy.deepcopy(with_quantized_linears(module).model).to(torch.float64)
    wide: Callable[[Any], Any] = lambda v: v.double() if isinstance(v, Tensor) and v.dtype in _NARROW else v  # noqa: E731
    args, kwargs = pytree.tree_map(wide, copy.deepcopy((args, kwargs)))
    with _InFloat64(), _HeldToNothing():
        result = module(*args, **kwargs)
    return [leaf for leaf in _leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _leaves(value: Any) -> list[Any]:
    """The tensors of an output, also of containers that pytree does not know (a model's own cache classes)."""
    found = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor) or not hasattr(leaf, "__dict__"):
            found.append(leaf)
        else:
            found.extend(_leaves(list(vars(leaf).values())))
    return found
