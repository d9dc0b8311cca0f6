"""What must hold on a GPU as on a CPU: fused models, clocks."""

from __future__ import annotations

import itertools
from typing import Any, get_args, get_type_hints

import pytest
import torch

import flora_fx
from benchmarks.contenders.models import make_model
from benchmarks.latency.latency import Job, sample
from flora_fx import FuseConfig
from flora_fx.measuring.method import Clock, bandwidth, compare, difference
from tests.gpu.places import DEVICES, on_gpu, settings, tokens


def _forms() -> list[FuseConfig]:
    names = ("layout", "up", "accumulate")
    choices = (get_args(get_type_hints(FuseConfig)[name]) for name in names)
    return [FuseConfig(**dict(zip(names, chosen, strict=True))) for chosen in itertools.product(*choices)]


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_every_form_is_the_model_in_float64(device: str) -> None:
    ids = tokens(device)
    model = make_model(settings(device, layers=1), "peft", dtype=torch.float64)
    expected = model(ids).logits
    captured = flora_fx.capture(model, input_ids=ids)
    for form in _forms():
        fused = flora_fx.fuse(captured, config=form)
        assert len(flora_fx.report(fused).fused) == 7, form
        assert difference(fused(input_ids=ids).logits, expected) <= 1e-12, form


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("placement", ["ffba-block", "ffba-shared"])
@torch.no_grad()
def test_ffba_is_the_model_in_float64(device: str, placement: Any) -> None:
    ids = tokens(device)
    model = make_model(settings(device, layers=1), placement, dtype=torch.float64)
    expected = model(ids).logits
    fused = flora_fx.fuse(flora_fx.capture(model, input_ids=ids))
    assert not flora_fx.report(fused).declines
    assert difference(fused(input_ids=ids).logits, expected) <= 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@torch.no_grad()
def test_fused_is_as_near_to_float64_as_peft(device: str, dtype: str) -> None:
    ids = tokens(device)
    model = make_model(settings(device, dtype), "peft")
    expected = make_model(settings(device, dtype), "peft", dtype=torch.float64)(ids).logits
    unfused = difference(model(ids).logits, expected)
    fused = flora_fx.fuse(flora_fx.capture(model, input_ids=ids))
    assert len(flora_fx.report(fused).fused) == 14
    assert difference(fused(input_ids=ids).logits, expected) <= 1.5 * unfused + 1e-7


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_packs_move_with_the_model(device: str) -> None:
    ids = tokens("cpu")
    model = make_model(settings("cpu"), "peft", dtype=torch.float64)
    expected = model(ids).logits
    fused = flora_fx.fuse(flora_fx.capture(model, input_ids=ids)).to(device)
    # The graph itself names no device for its weights; positions that were captured on the CPU are its own.
    for name, parameter in fused.named_parameters():
        assert parameter.device.type == device, name
    for name, pack in fused.get_submodule("_flora").named_buffers():
        assert pack.device.type == device, name
    if device == "cpu":
        torch.testing.assert_close(fused(input_ids=ids).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_a_clock_and_the_bandwidth(device: str) -> None:
    x = torch.ones(512, 512, device=device)
    calls = {"one": lambda: x @ x, "two": lambda: x @ x @ x}
    timings = compare(calls, reference="one", rounds=5, device=device)
    assert list(timings) == ["one", "two"]
    assert Clock(device)(lambda: x @ x) > 0
    assert bandwidth(device) > 1e8


@pytest.mark.parametrize(("device", "runner"), [("cpu", "eager"), on_gpu("cuda", "reduce-overhead")])
def test_contenders_agree_and_are_timed(device: str, runner: str) -> None:
    torch._dynamo.utils.counters.clear()
    names = ("base", "PEFT", "fused")
    job = Job(settings(device, layers=1), runner, prompt=7, new=6, passes=1, contenders=names)
    found = sample(job, 0, lambda done, total: None)
    assert (found["refused"], found["unavailable"]) == ({}, {})
    assert [len(found["samples"]["tpot"][name][0]) for name in names] == [6, 6, 6]
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
