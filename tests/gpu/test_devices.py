"""What must hold on a GPU as on a CPU; the CPU rows keep the tests themselves honest where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flora_fx
from flora_fx.benchmarks import latency
from flora_fx.benchmarks.method import Clock, bandwidth, compare, difference
from flora_fx.benchmarks.models import make_model
from flora_fx.benchmarks.settings import Settings
from flora_fx.benchmarks.torch_contenders import RUNNERS, make_contender
from flora_fx.export import export_onnx, load

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", CUDA]


def _settings(device: str, dtype: str = "float32") -> Settings:
    return Settings(shape="tiny", rank=4, dtype=dtype, device=device, batch=2)


def _tokens(device: str, length: int = 7) -> torch.Tensor:
    return torch.randint(128, (2, length), generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@torch.no_grad()
def test_fused_is_as_near_to_float64_as_peft(device: str, dtype: str) -> None:
    settings, tokens = _settings(device, dtype), _tokens(device)
    model = make_model(settings, "peft")
    expected = make_model(settings, "peft", dtype=torch.float64)(tokens).logits
    unfused = difference(model(tokens).logits, expected)
    fused = flora_fx.fuse(flora_fx.capture(model, input_ids=tokens))
    assert len(flora_fx.report(fused).fused) == 14
    assert difference(fused(input_ids=tokens).logits, expected) <= 1.5 * unfused + 1e-7


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_packs_move_with_the_model(device: str) -> None:
    tokens = _tokens("cpu")
    model = make_model(_settings("cpu"), "peft", dtype=torch.float64)
    expected = model(tokens).logits
    fused = flora_fx.fuse(flora_fx.capture(model, input_ids=tokens)).to(device)
    # The graph itself names no device for its weights; positions that were captured on the CPU are its own.
    for name, parameter in fused.named_parameters():
        assert parameter.device.type == device, name
    for name, pack in fused.get_submodule("_flora").named_buffers():
        assert pack.device.type == device, name
    if device == "cpu":
        torch.testing.assert_close(fused(input_ids=tokens).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_a_clock_and_the_bandwidth(device: str) -> None:
    x = torch.ones(512, 512, device=device)
    calls = {"one": lambda: x @ x, "two": lambda: x @ x @ x}
    timings = compare(calls, reference="one", rounds=5, device=device)
    assert list(timings) == ["one", "two"]
    assert Clock(device)(lambda: x @ x) > 0
    assert bandwidth(device) > 1e8


@pytest.mark.gpu
def test_cuda_graphs_agree_and_run() -> None:
    settings, prompt = _settings("cuda"), _tokens("cuda")
    contenders = {
        name: make_contender(form, settings, prompt, 16)
        for name, form in RUNNERS["reduce-overhead"].items()
        if name in ("base", "PEFT", "fused")
    }
    following = [prompt[:, :1]] * 4
    assert latency._disagreements(contenders, settings, prompt, following) == {}
    assert latency._not_compiled(contenders, prompt, following[0]) == {}
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", "float32"), pytest.param("cuda", "float16", marks=pytest.mark.gpu)]
)
def test_exported_decoder_gives_the_same_tokens(device: str, dtype: str, tmp_path: Path) -> None:
    settings = Settings(shape="tiny", rank=4, dtype=dtype)
    model = make_model(settings, "peft")
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    result = export_onnx(model, tmp_path / "out", providers=[provider])
    assert result.greedy_tokens_equal
    decoder = load(tmp_path / "out", providers=[provider])
    prompt = _tokens("cpu")[:1]
    reference = make_model(settings, "peft", dtype=torch.float32)
    expected = reference.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
    assert decoder.generate(prompt, max_new_tokens=6).tolist()[0][-6:] == expected.tolist()[0][-6:]
