"""Inductor's CUDA code without a CUDA device: what a GPU would launch, on any machine.

Device properties are an H100's; Triton compiles nothing, and nothing runs. It needs ``triton`` beside a CPU build of
torch, or a CUDA build (seen: torch 2.13 for CPUs with triton 3.9, CUDA builds of torch 2.11 and 2.14). What a call to a
library launches is not in the code: ``addmm`` copies what it adds to, a split-K GEMM reduces.
"""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._triton
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from flora_fx.errors import require

__all__ = ["CompiledGraph", "compiled_graphs", "cuda_code", "pretend_cuda"]

CompiledGraph = tuple[fx.GraphModule, Sequence[Any], dict[str, Any]]
"""A graph of Dynamo's, its example inputs, and the options that Inductor was given."""


class _H100:
    """What Inductor asks of a device's properties."""

    name = "NVIDIA H100 80GB HBM3"
    major, minor = 9, 0
    multi_processor_count = 132
    total_memory = 80 << 30
    warp_size = 32
    regs_per_multiprocessor = 65536
    max_threads_per_multi_processor = 2048
    max_threads_per_block = 1024
    shared_memory_per_block = 49152
    shared_memory_per_block_optin = 232448
    shared_memory_per_multiprocessor = 233472
    L2_cache_size = 50 << 20
    gcnArchName = ""  # noqa: N815


_INTERFACE = "torch._dynamo.device_interface.CudaInterface"
_ANSWERS: dict[str, Any] = {
    "torch.cuda.is_available": True,
    "torch.cuda.device_count": 1,
    "torch.cuda.current_device": 0,
    "torch.cuda.get_device_properties": _H100(),
    "torch.cuda._get_device_properties": _H100(),
    "torch.cuda.get_device_capability": (9, 0),
    "torch.cuda.synchronize": None,
    "torch.cuda._lazy_init": None,
    "torch.cuda.is_bf16_supported": True,
    "torch.cuda._exchange_device": 0,
    "torch.cuda._maybe_exchange_device": 0,
    "torch.cuda.set_rng_state": None,
    f"{_INTERFACE}.get_device_properties": _H100(),
    f"{_INTERFACE}.Worker.get_device_properties": _H100(),
    f"{_INTERFACE}.Worker.current_device": 0,
    f"{_INTERFACE}.get_compute_capability": 90,
    f"{_INTERFACE}.is_available": True,
    f"{_INTERFACE}.current_device": 0,
    f"{_INTERFACE}.raise_if_triton_unavailable": None,
    f"{_INTERFACE}.is_triton_capable": True,
    "torch._subclasses.fake_tensor.init_gpu_context": None,
    "torch.utils._triton.triton_hash_with_backend": "none",
    "torch.utils._triton.triton_backend": None,
}


@contextlib.contextmanager
def pretend_cuda() -> Iterator[None]:
    """Inside, Inductor finds an H100."""
    with contextlib.ExitStack() as stack:
        for name, answer in _ANSWERS.items():
            stack.enter_context(unittest.mock.patch(name, create=True, return_value=answer))
        state = unittest.mock.patch(
            "torch.cuda.get_rng_state", side_effect=lambda *_: torch.zeros(16, dtype=torch.uint8)
        )
        stack.enter_context(state)
        _forget_triton()
        try:
            yield
        finally:
            _forget_triton()


def _forget_triton() -> None:
    """Whether there is a Triton that works is asked once and kept."""
    for name in ("has_triton", "has_triton_package"):
        clear = getattr(getattr(torch.utils._triton, name, None), "cache_clear", None)
        if clear:
            clear()


def compiled_graphs(call: Callable[[], object]) -> list[CompiledGraph]:
    """What Inductor is given to compile while something is called; the graphs are run as they are."""
    found: list[CompiledGraph] = []

    def keep(self: Any, graph: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
        found.append((graph, inputs, dict(self.config)))
        return graph

    torch._dynamo.reset()
    with unittest.mock.patch.object(torch._TorchCompileInductorWrapper, "__call__", keep):
        call()
    torch._dynamo.reset()
    return found


class _WrittenError(Exception):
    """The code is there; what follows would run it."""


def cuda_code(graph: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> str:
    """The Python that Inductor writes for a graph on an H100.

    Args:
        graph: of Dynamo's, on any device.
        inputs: examples, on the meta device or fake.
        options: Inductor's.

    Returns:
        kernels, and the calls of them.

    Raises:
        MissingExtraError: triton is not installed.
    """
    require("triton", "test")
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering

    found: list[str] = []

    def stop(self: Any) -> None:
        code = self.codegen()[0]
        found.append(getattr(code, "value", code))
        raise _WrittenError

    # torchao turns on what decides how a product of one row is written, for the whole process, wherever it quantizes.
    config = {"fx_graph_cache": False, "compile_threads": 1, "coordinate_descent_tuning": False} | options
    stopped = unittest.mock.patch.object(GraphLowering, "compile_to_module", stop)
    with torch._inductor.config.patch(config):
        lowered, given = _on_cuda(graph, inputs)
        with pretend_cuda(), stopped:
            try:
                compile_fx_inner(lowered, given)
            except Exception:
                if not found:
                    raise
    return found[0]


def _on_cuda(graph: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """A graph in ATen's operators, and fake inputs, both of a CUDA device."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    def empty(device: torch.device) -> list[Any]:
        return [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
            if isinstance(value, Tensor)
            else value
            for value in inputs
        ]

    def moved(value: Any) -> Any:
        return cuda if isinstance(value, torch.device) else value

    cuda = torch.device("cuda", 0)
    with torch.no_grad():
        aten = make_fx(graph)(*empty(torch.device("meta")))
        for node in aten.graph.nodes:
            node.args = fx.node.map_aggregate(node.args, moved)
            node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
        aten.recompile()
        with pretend_cuda(), FakeTensorMode(allow_non_fake_inputs=True):
            given = empty(cuda)
            return make_fx(aten, tracing_mode="fake", decomposition_table=select_decomp_table())(*given), given
