"""The decode step in a CUDA graph: where it can be, by itself; what forbids one is said."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_fx.errors import ExportError
from flora_fx.export import load
from flora_fx.export.run.decoder import Decoder
from flora_fx.export.run.one_thread import OneThread
from flora_fx.export.run.session import Session
from flora_fx.export.trace.model import Kind
from tests.export.exported_models import Export, Exported
from tests.export.genai_models import VOCAB, Built
from tests.export.stand_in import CUDA, FakeCuda, Forbidden
from tests.faults.exports import by_hand

CPU = "CPUExecutionProvider"
NOT_ALL = "This session cannot use the graph capture feature: not all nodes have been partitioned to the CUDA provider"
CAPTURING = "CUDA failure 900: operation not permitted when stream is capturing"


@pytest.fixture
def llama(exported: Export) -> Exported:
    """Of target "decoder"."""
    return exported("Llama")


def prompts(batch: int, length: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1:, :2] = 0
    return torch.randint(1, VOCAB, (batch, length)) * mask, mask


# Where there is one


def test_by_default_on_cuda(llama: Exported, cuda: FakeCuda) -> None:
    decoder: Any = load(llama.directory)
    assert repr(decoder) == f"Decoder(LlamaForCausalLM, float32, {CUDA}, CUDA graph)"
    assert cuda.runs == ["-1", "1"], "it is captured at once"
    ids, mask = prompts(2, 6)
    assert torch.equal(decoder.generate(ids, mask), llama.decoder.generate(ids, mask))
    assert cuda.runs[2:] == ["-1", *["2"] * 19]
    assert cuda.sessions == 1


@pytest.mark.parametrize("cuda_graph", [None, False, True])
def test_as_asked_for(llama: Exported, cuda: FakeCuda, cuda_graph: bool | None) -> None:
    decoder: Any = load(llama.directory, cuda_graph=cuda_graph)
    assert decoder.session.cuda_graph is (cuda_graph is not False)
    decoder.generate(*prompts(1, 3), max_new_tokens=2)
    assert set(cuda.runs) == ({None} if cuda_graph is False else {"-1", "1"})


def test_on_a_cpu_by_default_there_is_none(llama: Exported) -> None:
    assert "CUDA graph" not in repr(load(llama.directory, providers=[CPU]))


def test_prompts_are_in_none_and_each_shape_of_a_step_is_in_one(built: Built, cuda: FakeCuda) -> None:
    decoder = built.decoder(CUDA)
    for batch, length in ((1, 5), (2, 5), (1, 9), (1, 300), (2, 5)):
        ids, mask = prompts(batch, length)
        assert torch.equal(decoder.generate(ids, mask, max_new_tokens=3), built.expected(ids, mask, max_new_tokens=3))
    # The third finds the first one's; the fourth has bytes enough (two rows of 256), and a shape of its own.
    told = ["-1", "1", "1", "-1", "2", "2", "-1", "3", "3", "-1", "4", "4", "-1", "2", "2"]
    assert cuda.runs == told


def test_a_run_that_is_no_step(llama: Exported, cuda: FakeCuda) -> None:
    decoder: Any = load(llama.directory)
    ids, mask = prompts(2, 6)
    assert torch.equal(decoder(ids, mask), llama.decoder(ids, mask))
    assert cuda.runs == ["-1", "1", "-1"]


# Where there is none


@pytest.mark.parametrize(
    ("cuda", "runs"),
    [(FakeCuda(refuses=NOT_ALL), []), (FakeCuda(breaks=CAPTURING), ["-1", "1"])],
    ids=["as the session is made", "as a run is captured"],
)
def test_one_that_cannot_be_captured(llama: Exported, cuda: FakeCuda, runs: list[str]) -> None:
    reason = cuda.refuses or cuda.breaks or ""
    with cuda.installed():
        with pytest.warns(RuntimeWarning, match=f"without a CUDA graph, which cuda_graph=False asks for: .*{reason}"):
            decoder: Any = load(llama.directory)
        assert cuda.runs == runs
        assert cuda.together == 1, "the first session is let go"
        ids, mask = prompts(2, 6)
        assert torch.equal(decoder.generate(ids, mask), llama.decoder.generate(ids, mask))
        assert set(cuda.runs[len(runs) :]) == {None}
        with pytest.raises(
            ExportError, match=f"cannot be decoded in a CUDA graph; pass cuda_graph=False to .*{reason}"
        ):
            load(llama.directory, cuda_graph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(llama.directory, cuda_graph=False)


@pytest.mark.parametrize("cuda_graph", [None, True])
def test_what_is_wrong_without_one_too_is_what_is_said(
    llama: Exported, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, cuda_graph: bool | None
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ExportError("ONNX Runtime cannot load it")

    monkeypatch.setattr(Session, "__init__", fail)
    with pytest.raises(ExportError, match=r"^ONNX Runtime cannot load it$"):
        load(llama.directory, cuda_graph=cuda_graph)


def test_on_a_cpu(llama: Exported) -> None:
    with pytest.raises(ExportError, match=r"cuda_graph needs the CUDAExecutionProvider; .* runs on CPUExecution"):
        load(llama.directory, providers=[CPU], cuda_graph=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("causal-lm", "needs an export whose target is 'decoder'; this one is 'general': its keys and values change"),
        ("encoder", r"cuda_graph is for causal LMs whose target is 'decoder'; .*out is of kind 'encoder'"),
        ("seq2seq-lm", "is of kind 'seq2seq-lm'"),
    ],
)
def test_of_another_kind(cuda: FakeCuda, tmp_path: Path, kind: Kind, message: str) -> None:
    by_hand(tmp_path / "out", kind)
    assert not load(tmp_path / "out").session.cuda_graph
    with pytest.raises(ExportError, match=message):
        load(tmp_path / "out", cuda_graph=True)


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_providers_own_option_is_refused(llama: Exported, cuda: FakeCuda, value: str) -> None:
    with pytest.raises(ExportError, match=r"enable_cuda_graph would capture .* pass cuda_graph=True or False to load"):
        load(llama.directory, providers=[(CUDA, {"enable_cuda_graph": value})])


# What ONNX Runtime does with graphs


def test_the_stand_in_replays_at_the_addresses_of_the_capture(llama: Exported, cuda: FakeCuda) -> None:
    decoder: Any = load(llama.directory)
    decoder._memory._batches.clear()
    decoder._memory._graphs = iter([1])  # a number that is taken
    with pytest.raises(Forbidden, match="CUDA graph 1 was captured at"):
        decoder.generate(*prompts(2, 5))


def test_two_threads_run_whatever_the_number_of_callers(llama: Exported, cuda: FakeCuda) -> None:
    ran: set[int] = set()
    decoder: Any = load(llama.directory)
    ids, mask = prompts(2, 5)
    run = type(decoder.session._session).run_with_iobinding
    found: list[Tensor] = []

    def listen(session: Any, *arguments: Any) -> None:
        ran.add(threading.get_ident())
        run(session, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(decoder.session._session), "run_with_iobinding", listen)
        for _ in range(4):
            one = threading.Thread(
                target=lambda: found.append(decoder.session.run(_inputs(decoder), keep=[])["logits"])
            )
            one.start()
            one.join()
        decoder.generate(ids, mask, max_new_tokens=3)
    assert len(found) == 4
    assert all(torch.equal(logits, found[0]) for logits in found)
    assert len(ran) == 2
    assert threading.get_ident() in ran


def _inputs(decoder: Decoder) -> dict[str, Any]:
    past = [name for name in decoder.manifest.inputs if name.startswith("past")]
    empty = {name: decoder.session.empty(name, {"batch": 1, "past": 0}) for name in past}
    return {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2, dtype=torch.int64), **empty}


def test_a_call_that_fails_in_the_other_thread() -> None:
    run = OneThread()
    run(lambda: None)
    raised: list[BaseException] = []

    def call() -> None:
        try:
            run(lambda: 1 / 0)
        except ZeroDivisionError as error:
            raised.append(error)

    other = threading.Thread(target=call)
    other.start()
    other.join()
    assert len(raised) == 1
