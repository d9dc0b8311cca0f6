"""The Triton kernels in Inductor's CUDA code, compiled for GPUs that are not there, and run in Triton's interpreter.

As a script it runs one adapted block so and prints how far its outputs are from the model's, in float32. The
environment has to say ``TRITON_INTERPRET=1`` before Triton is imported.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import re
import tempfile
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels.pretend_cuda import CompiledGraph, cuda_code
from flora_fx.backend import flora

__all__ = ["Block", "binary", "kernels", "written"]

WIDTH, INNER, RANKS = 32, 48, (4, 6, 5)
_KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.DOTALL)


class Block(nn.Module):
    """A gated block with an adapter on each projection, the residual and a norm: all that reads unrolled sums."""

    def __init__(self) -> None:
        super().__init__()
        for name, (wide, rank, out) in {
            "g": (WIDTH, RANKS[0], INNER),
            "u": (WIDTH, RANKS[1], INNER),
            "d": (INNER, RANKS[2], WIDTH),
        }.items():
            self.add_module(name, nn.Linear(wide, out, bias=False))
            self.add_module(f"{name}a", nn.Linear(wide, rank, bias=False))
            self.add_module(f"{name}b", nn.Linear(rank, out, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.g(x) + 0.5 * self.gb(self.ga(x))
        up = self.u(x) + 0.7 * self.ub(self.ua(x))
        inner = nn.functional.silu(gate) * up
        y = x + self.d(inner) + 0.3 * self.db(self.da(inner))
        return y * torch.rsqrt(y.float().square().mean(-1, keepdim=True) + 1e-6).to(y.dtype)


def written(model: nn.Module, x: Tensor) -> tuple[str, list[Any]]:
    """The code that Inductor writes for an H100 when our backend compiles a model, and what it is called with."""
    graphs: list[CompiledGraph] = []
    arguments: list[list[Any]] = []

    def keep(self: Any, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append((graph, inputs, dict(self.config)))

        def run(*given: Any) -> Any:
            arguments.append(list(given))
            return graph(*given)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=flora, options={"flora.accumulate": "unrolled"})
    with unittest.mock.patch.object(torch._TorchCompileInductorWrapper, "__call__", keep), torch.no_grad():
        compiled(x)
    torch._dynamo.reset()
    ((graph, inputs, options),) = graphs
    return cuda_code(graph, inputs, options), arguments[0]


def kernels(code: str) -> dict[str, str]:
    """The kernels of some code by name, each as the text of a module."""
    return dict(_KERNEL.findall(code))


@contextlib.contextmanager
def imported(name: str, text: str) -> Iterator[ModuleType]:
    """A kernel's module without Inductor's heuristics, which look for a GPU; Triton wants its text in a file."""
    text = text.replace("triton_helpers.set_driver_to_gpu()", "")
    text = re.sub(r"@triton_heuristics\..*?(?=^@triton\.jit)", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\blibdevice\.(exp|rsqrt)\(", r"tl.\1(", text)  # the interpreter has no libraries of a device
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, f"{name}.py")
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def signature(text: str) -> dict[str, str]:
    """The types of a kernel's parameters; its blocks are ``constexpr``."""
    found = re.search(r"'signature': (\{.*?\})", text)
    assert found is not None
    types: dict[str, str] = ast.literal_eval(found[1])
    return types


BLOCK = 16


def binary(name: str, text: str, capability: int) -> bytes:
    """A kernel as machine code for a GPU of a compute capability (80, 90)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = signature(text)
    blocks = {key: BLOCK for key, kind in types.items() if kind == "constexpr"}
    with imported(name, text) as module:
        source = ASTSource(getattr(module, name), types, constexprs=blocks)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    found: bytes = compiled.asm["cubin"]
    return found


class _Interpreted:
    """What stands for Inductor's `AsyncCompile`."""

    def triton(self, name: str, text: str, **options: Any) -> _Interpreted:
        self.name, self.text = name, text
        other = _Interpreted()
        other.name, other.text = name, text
        return other

    def run(self, *args: Any, stream: Any) -> None:
        types = signature(self.text)
        blocks = {key: BLOCK for key, kind in types.items() if kind == "constexpr"}
        assert set(blocks) == {"XBLOCK"}
        numbers = dict(zip((key for key in types if key not in blocks), args, strict=True))
        with imported(self.name, self.text) as module:
            getattr(module, self.name)[(-(-numbers["xnumel"] // BLOCK),)](*args, **blocks)

    def wait(self, scope: Any) -> None:
        pass


def interpreted(code: str, inputs: list[Any]) -> Any:
    """Run Inductor's CUDA code on the CPU: GEMMs by torch, kernels by Triton's interpreter."""
    guards = torch._C._dynamo.guards
    patches = {
        "torch._inductor.async_compile.AsyncCompile": _Interpreted,
        "torch._C._dynamo.guards._empty_strided_cuda": guards._empty_strided_cpu,
        "torch._C._cuda_getCurrentRawStream": lambda device: 0,
        "torch.cuda._DeviceGuard": lambda device: contextlib.nullcontext(),
        "torch.cuda.set_device": lambda device: None,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in patches.items():
            stack.enter_context(unittest.mock.patch(name, stand_in, create=True))
        scope: dict[str, Any] = {"__name__": "written"}
        exec(compile(code, "written", "exec"), scope)
        return scope["call"](list(inputs))


def main() -> None:
    torch.manual_seed(0)
    model, x = Block().requires_grad_(False), torch.randn(2, 5, WIDTH)
    expected = model(x)
    code, inputs = written(model, x)
    assert len(kernels(code)) == 2
    (found,) = interpreted(code, inputs)
    print("largest difference", (found - expected).abs().max().item())


if __name__ == "__main__":
    main()
