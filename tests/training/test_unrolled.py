"""Unrolled up-projections through the backend: what a GPU gets, run and counted on a CPU."""

from __future__ import annotations

import pytest
import torch

from flora_fx import backend
from flora_fx.ops import accumulate, accumulate_unrolled
from tests.architectures import example_inputs, lora_model

from .tuned import fused_report

UNROLLED = {"flora.inner": "aot_eager", "flora.accumulate": "unrolled"}


def frozen(name: str) -> torch.nn.Module:
    return lora_model(name).double().eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert"])
@torch.no_grad()
def test_frozen_models_are_exact_and_their_adapters_stay_live(name: str) -> None:
    model, arguments = frozen(name), example_inputs(name)
    expected = model(**arguments)[0]
    compiled = torch.compile(model, backend="flora", options=UNROLLED)
    for _ in range(2):
        torch.testing.assert_close(compiled(**arguments)[0], expected, rtol=0, atol=1e-12)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.mul_(-1.5)
        expected = model(**arguments)[0]
    report = backend.last_report()
    assert report is not None
    assert not report.declines
    assert report.unrolled == max(p.shape[1] for key, p in model.named_parameters() if "lora_B" in key)


def test_inductor_is_told_of_the_highest_rank_where_kernels_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which stands for a GPU: no processor's loops are at hand."""
    told: list[dict[str, object]] = []
    graphs: list[torch.fx.GraphModule] = []

    def compiler(inner: str, mode: str | None, options: dict[str, object]) -> object:
        told.append(options)
        return lambda graph, inputs: graphs.append(graph) or graph

    monkeypatch.setattr(backend, "_compiler", compiler)
    model = lora_model("llama").eval()
    arguments = example_inputs("llama")
    torch.compile(model, backend="flora")(**arguments, use_cache=False)
    assert told == [{}]
    assert graphs[0].graph.find_nodes(op="call_function", target=accumulate)

    torch._dynamo.reset()
    elsewhere = {key: value.to("meta") for key, value in arguments.items()}
    torch.compile(model.to("meta").requires_grad_(False), backend="flora")(**elsewhere, use_cache=False)
    rank = fused_report(14).unrolled
    assert told[1:] == [{"unroll_reductions_threshold": rank + 1}]
    assert len(graphs[1].graph.find_nodes(op="call_function", target=accumulate_unrolled)) == 14
    assert not graphs[1].graph.find_nodes(op="call_function", target=accumulate)
