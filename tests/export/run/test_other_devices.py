"""What holds where values are on another device than the CPU; the stand-in forbids what CUDA forbids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_fx.export import load
from flora_fx.export.check.checking import check
from flora_fx.export.directory.manifest import read_manifest
from flora_fx.export.run import buffer
from flora_fx.export.run.buffer import Buffer
from flora_fx.export.trace.model import unwrap
from tests.export.exported_models import Export, Exported
from tests.export.stand_in import CUDA, FakeCuda, Forbidden, Foreign

IDS = torch.tensor([[0, 0, 61, 8], [11, 23, 5, 40]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
EXAMPLES = {
    "bert": {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": torch.zeros_like(IDS)},
    "vit": {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 24 * 24).view(2, 3, 24, 24)},
}


@pytest.mark.parametrize("name", ["llama", "Llama", "bert", "vit", "t5"])
def test_the_check_of_an_export(exported: Export, seq2seq: Callable[[str], Exported], name: str) -> None:
    export = seq2seq(name) if name == "t5" else exported(name, "general" if name == "llama" else None)
    with FakeCuda().installed() as cuda:
        core = unwrap(export.model.eval())
        found = check(export.directory, read_manifest(export.directory), core, None, EXAMPLES.get(name))
    assert found.checked_on == (f"{CUDA}, in a CUDA graph" if name == "Llama" else CUDA)
    if name in EXAMPLES:
        assert 0 < found.max_rel_error < 1e-4
    else:
        assert found.max_rel_error == pytest.approx(export.result.max_rel_error, abs=1e-7)
    assert found.greedy_tokens_equal == export.result.greedy_tokens_equal
    assert len(cuda.runs) > 0


@pytest.fixture(params=["general", "decoder"])
def either(exported: Export, request: pytest.FixtureRequest) -> Exported:
    return exported("llama", "general") if request.param == "general" else exported("Llama")


@pytest.fixture
def llama(exported: Export) -> Exported:
    return exported("Llama")


def test_what_callers_pass_and_get(either: Exported, cuda: FakeCuda) -> None:
    export = either
    decoder: Any = load(export.directory)
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": []}
    expected = export.decoder.generate(IDS, MASK, **options)
    assert decoder.session.device == "cuda"
    for found in (decoder.generate(Foreign(IDS), Foreign(MASK), **options), decoder(Foreign(IDS), Foreign(MASK))):
        assert type(found) is Tensor
    assert torch.equal(decoder.generate(Foreign(IDS), Foreign(MASK), **options), expected)
    assert torch.equal(decoder(Foreign(IDS), Foreign(MASK)), export.decoder(IDS, MASK))
    assert all(type(step) is Tensor for step in decoder.stream(IDS, MASK, do_sample=True, seed=0, **options))


def test_which_of_several(llama: Exported, cuda: FakeCuda) -> None:
    decoder: Any = load(llama.directory, providers=[(CUDA, {"device_id": "1"})])
    assert decoder.session.device_id == 1
    assert torch.equal(decoder.generate(IDS, MASK), llama.decoder.generate(IDS, MASK))
    assert cuda.devices == {torch.device("cuda", 1)}


# What would be wrong numbers on a GPU


@pytest.mark.parametrize("forgotten", ["upload", "_wait"])
def test_what_torch_wrote_and_did_not_hand_over(
    llama: Exported, cuda: FakeCuda, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder: Any = load(llama.directory)
    expected = decoder.generate(IDS, MASK)
    monkeypatch.setattr(Buffer if forgotten == "upload" else buffer, forgotten, lambda _: None)
    if forgotten == "upload":
        assert not torch.equal(decoder.generate(IDS, MASK), expected)
    else:
        with pytest.raises(Forbidden, match="before torch had written its inputs"):
            decoder.generate(IDS, MASK)


def test_new_memory_is_zeroed_before_it_is_used(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(memory.pending for memory in cuda.memories)
    found = Buffer(8, "cuda")
    (memory,) = cuda.memories
    assert memory.address == found.address
    assert not memory.pending
    monkeypatch.setattr(buffer, "_wait", lambda _: None)
    found.nearest((2,), torch.float32)[1:].fill_(3.0)
    assert memory.pending


# The stand-in

X = torch.arange(6.0).view(2, 3)

ALLOWED: dict[str, Callable[[Foreign], Tensor]] = {
    "one number": lambda x: x + torch.tensor(2.0),
    "a number of Python": lambda x: x * 2,
    "indices": lambda x: x[torch.arange(2), torch.tensor([0, 2])],
    "a mask of the CPU": lambda x: x[torch.tensor([True, False])],
    "a copy": lambda x: x.clone().copy_(X + 1),
    "its own device": lambda x: x + X.to(x.device),
    "made there": lambda x: x + torch.ones(3, device=x.device) + x.new_ones(3),
}
MIXED: dict[str, Callable[[Foreign], Tensor]] = {
    "a sum": lambda x: x + X,
    "a comparison": lambda x: x == X,
    "indices of an operator": lambda x: x.index_fill(-1, torch.tensor([1]), 0.0),
    "a mask of an operator": lambda x: x.masked_fill(X > 2, 0.0),
    "an index of the CPU's": lambda x: X[x.argmax(-1)],
    "a mask of the CPU's": lambda x: X[x > 2],
    "out": lambda x: torch.mul(x, 2, out=torch.empty(2, 3)),
    "a list": lambda x: torch.cat([x, X]),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_cuda_does(cuda: FakeCuda, case: str) -> None:
    found = ALLOWED[case](Foreign(X.clone()))
    assert type(found) is Foreign
    assert torch.equal(found.cpu(), ALLOWED[case](X.clone()))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", MIXED)
def test_what_cuda_does_not(cuda: FakeCuda, case: str) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        MIXED[case](Foreign(X.clone()))


def test_the_way_to_the_cpu(cuda: FakeCuda) -> None:
    x = Foreign(X)
    for found in (x.cpu(), x.to("cpu"), x.to("cpu", torch.float16), torch.empty(2, 3).copy_(x)):
        assert type(found) is Tensor
        assert torch.equal(found.float(), X)
    assert (x.max().item(), float(x.max()), x.tolist(), bool((x > 4).any())) == (5.0, 5.0, X.tolist(), True)
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()
