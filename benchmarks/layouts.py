"""Which layout of packs and up-projections is fastest in PyTorch: the defaults of `FuseConfig` come from here.

All variants run in one process, each compiled from a code object of its own (several callables that share one share
Dynamo's cache and its recompile limit), and the graphs that Dynamo compiled are counted.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

import flora_fx
from flora_fx import FuseConfig
from flora_fx.demo.measure import compare

from .models import adapted_llama, step_inputs

__all__ = ["measure"]


FORMS = {
    "layout": ("joined", "beside"),
    "up": ("block_diagonal", "per_projection"),
    "accumulate": ("addmm", "add"),
}


def measure(
    shape: str = "smollm-135m",
    layers: int = 4,
    rank: int = 16,
    rounds: int = 30,
    runners: tuple[str, ...] = ("eager", "inductor"),
) -> dict[str, Any]:
    """Median ratio to the base without adapters, by runner, phase (prefill of 128, one token after 128) and variant."""
    result: dict[str, Any] = {"shape": shape, "layers": layers, "rank": rank, "rounds": rounds, "ratios": []}
    phases = {"prefill": step_inputs(shape, layers, 128, 0), "decode": step_inputs(shape, layers, 1, 128)}
    for runner, (phase, inputs) in itertools.product(runners, phases.items()):
        with torch.no_grad():
            graphs = _graphs(shape, layers, rank, inputs)
            expected = graphs["peft"](*inputs)
            calls = {name: _call(graph, inputs, runner) for name, graph in graphs.items()}
            for name, call in calls.items():
                if name != "base":  # a ratio of something that computes something else is worth nothing
                    torch.testing.assert_close(call(), expected, rtol=2e-3, atol=2e-3)
            timings = compare(calls, reference="base", rounds=rounds)
        result["ratios"] += [
            {"runner": runner, "phase": phase, "variant": name, "ms": t.milliseconds, "ratio": t.ratio}
            | {"low": t.low, "high": t.high}
            for name, t in timings.items()
        ]
        torch._dynamo.reset()
    return result


def _graphs(shape: str, layers: int, rank: int, inputs: tuple[Tensor, ...]) -> dict[str, fx.GraphModule]:
    graphs = {
        "base": flora_fx.capture(adapted_llama(shape, layers, rank=None), *inputs),
        "peft": flora_fx.capture(adapted_llama(shape, layers, rank=rank), *inputs),
    }
    for forms in itertools.product(*FORMS.values()):
        # A model of its own: two ways of fusing one model would take its weights from each other.
        graph = flora_fx.capture(adapted_llama(shape, layers, rank=rank), *inputs)
        config = FuseConfig(**dict(zip(FORMS, forms, strict=True)))  # type: ignore[arg-type]
        graphs[", ".join(forms)] = flora_fx.fuse(graph, config=config)
    return graphs


def _call(graph: fx.GraphModule, inputs: tuple[Tensor, ...], runner: str) -> Callable[[], Tensor]:
    def call(*args: Tensor) -> Tensor:
        found: Tensor = graph(*args)
        return found

    if runner == "eager":
        return lambda: call(*inputs)
    own = types.FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = torch.compile(own, backend=runner, fullgraph=True)
    compiled(*inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1, "this variant was not compiled"
    return lambda: compiled(*inputs)


def table(result: dict[str, Any]) -> str:
    """The result for readers: each phase's ratios to the base, with their 95% intervals."""
    lines = []
    for (runner, phase), rows in itertools.groupby(result["ratios"], key=lambda row: (row["runner"], row["phase"])):
        lines.append(f"{runner}, {phase}")
        lines += [
            f"  {row['variant']:<32}{row['ms']:>9.2f} ms  ×{row['ratio']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]"
            for row in rows
        ]
    return "\n".join(lines)
