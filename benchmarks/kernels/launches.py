"""What one call of a model launches, counted by kind and name at four heights.

A count is ``{(kind, name): times}``. Kinds are ``gemm``, ``elementwise`` (add, mul and their like on floating-point
tensors), ``generated`` (by a compiler: elementwise work and reductions, fused) and ``other``. Attention is ``other``
where it is one operator; where a graph spells it out (ONNX), its two products are GEMMs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flora_fx.graph.counting import kind_of
from flora_fx.graph.program import open_program

from ..measure.trace import trace
from .pretend_cuda import compiled_graphs, cuda_code

__all__ = [
    "Count",
    "cuda_launches",
    "device_kernels",
    "dispatched",
    "generated",
    "graph_nodes",
    "onnx_nodes",
]

Count = Counter[tuple[str, str]]


def graph_nodes(graph: fx.GraphModule) -> Count:
    """Nodes of a captured graph that compute something, views and shapes included.

    >>> class Model(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x) * 2
    >>> graph_nodes(torch.fx.symbolic_trace(Model(2, 3)))
    Counter({('gemm', 'linear'): 1, ('elementwise', 'mul'): 1})
    """
    program = open_program(graph)
    kinds = ((kind_of(program, node), node.target) for node in program.graph.nodes)
    return Counter((kind, getattr(target, "__name__", str(target))) for kind, target in kinds if kind is not None)


def dispatched(call: Callable[[], object]) -> Count:
    """ATen operators that a call executes one by one, without those that launch nothing: views, checks, allocations.

    >>> x = torch.ones(2, 3)
    >>> dispatched(lambda: (x + 1).t() @ x)
    Counter({('elementwise', 'aten.add'): 1, ('gemm', 'aten.mm'): 1})
    """
    with _Dispatched() as mode:
        call()
    return mode.found


_GEMM = re.compile(r"(^|[._])(mm|bmm|addmm|baddbmm|bias_addmm|linear_pointwise|linear)(_\d+)?$")
_ELEMENTWISE = re.compile(r"\.(add|sub|mul|div)_?$")


class _Dispatched(TorchDispatchMode):
    """Counts the operators below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Count = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = _tensors((args, kwargs)), _tensors(out)
        fresh = {_storage(tensor) for tensor in written} - {_storage(tensor) for tensor in read}
        name = str(func.overloadpacket)
        if func._schema.is_mutable or (fresh and not name.startswith(("aten.empty", "aten.new_empty"))):
            elementwise = _ELEMENTWISE.search(name) and all(tensor.is_floating_point() for tensor in written)
            kind = "gemm" if _GEMM.search(name) else "elementwise" if elementwise else "other"
            self.found[kind, name] += 1
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


_CALL = re.compile(r"^\s+(?:\w+ = )?(?:extern_kernels\.(\w+)|torch\.ops\.([\w.]+)|(cpp_\w+)|(triton_\w+)\.run)\(", re.M)


def generated(compiled: Callable[[], object]) -> Count:
    """Calls in the Python code that Inductor writes for a function: kernels of its own, and those it takes from ATen.

    Args:
        compiled: calls something from `torch.compile`; it is compiled anew as far as that code, and not run.

    >>> x = torch.ones(4, 4)
    >>> compiled = torch.compile(lambda x: torch.relu(x @ x) + 1)
    >>> sorted(generated(lambda: compiled(x)).items())
    [(('gemm', 'extern_kernels.mm'), 1), (('generated', 'cpp_fused'), 1)]
    """
    from torch._inductor.utils import get_code

    # A cache would give no code, and would keep what was never compiled.
    caches = (
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(fx_graph_cache=False),
    )
    with caches[0], caches[1]:
        code = set(get_code(compiled))
    torch._dynamo.reset()
    return _counted(code)


def cuda_launches(compiled: Callable[[], object]) -> Count:
    """The same of the code that Inductor would write for an H100, on any machine: see `pretend_cuda`.

    Args:
        compiled: calls something from `torch.compile`, best on the meta device; it runs as it is.
    """
    return _counted([cuda_code(*graph) for graph in compiled_graphs(compiled)])


def _counted(code: Iterable[str]) -> Count:
    """Calls of kernels in Inductor's code."""
    found: Count = Counter()
    for extern, operator, cpp, triton in (match.groups() for source in code for match in _CALL.finditer(source)):
        if cpp or triton:
            template = re.search(r"_tem_|gemm", cpp or triton)  # autotuning may choose a generated GEMM
            found["gemm" if template else "generated", "cpp_fused" if cpp else "triton"] += 1
        else:
            name = f"extern_kernels.{extern}" if extern else operator.removesuffix(".default")
            found["gemm" if _GEMM.search(name) else "other", name] += 1
    return found


_DEVICE_GEMM = re.compile(r"gemm|gemv|gemvx|splitk|nvjet|xmma|cutlass|dot_kernel", re.I)
_DEVICE_ATTENTION = re.compile(r"fmha|flash|attention", re.I)
_DEVICE_ELEMENTWISE = re.compile(r"elementwise", re.I)
_LAUNCH = re.compile(r"cu(da)?(GraphLaunch|LaunchKernel)")


def device_kernels(call: Callable[[], object]) -> Count:
    """Kernels that a call ran on the GPU, and (as kind ``launch``) the calls of the CUDA runtime that started them."""
    for _ in range(2):  # the first call allocates, loads modules and tunes; the next one may compile anew
        call()
    found: Count = Counter()
    for event in trace(call, "cuda"):
        name = str(event["name"])
        if event.get("cat") == "kernel":
            found[_device_kind(name), name] += 1
        elif event.get("cat") in ("cuda_runtime", "cuda_driver") and _LAUNCH.match(name):
            found["launch", name] += 1
    return found


def _device_kind(kernel: str) -> str:
    """The kind of a CUDA kernel, by the names that cuBLAS, CUTLASS, ATen and Inductor give.

    >>> _device_kind("nvjet_tst_64x8_64x16_1x4_h_bz_TNT"), _device_kind("fmha_cutlassF_bf16_aligned_64x64_rf_sm80")
    ('gemm', 'other')
    """
    if _DEVICE_ATTENTION.search(kernel):
        return "other"
    if _DEVICE_GEMM.search(kernel):
        return "gemm"
    if kernel.startswith("triton_"):
        return "generated"
    return "elementwise" if _DEVICE_ELEMENTWISE.search(kernel) else "other"


_ONNX_KINDS = {
    **dict.fromkeys(("Gemm", "MatMul", "FusedMatMul", "FusedGemm"), "gemm"),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), "elementwise"),
}


def onnx_nodes(types: Mapping[str, int]) -> Count:
    """Nodes of an ONNX graph, from how many it has of each operator type.

    >>> onnx_nodes({"MatMul": 7, "Mul": 1})
    Counter({('gemm', 'MatMul'): 7, ('elementwise', 'Mul'): 1})
    """
    return Counter({(_ONNX_KINDS.get(name, "other"), name): times for name, times in types.items()})
