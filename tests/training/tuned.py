"""Models to fine-tune beside an unfused twin, and what training of the two has to agree in."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from torch import Tensor, nn

from flora_fx.backend import last_report
from flora_fx.compile.lifting import _calls
from flora_fx.passes.plan.layout import ALIGNED
from flora_fx.reporting.fusion_report import FusionReport
from tests.adapters import D_IN
from tests.architectures import lora_model

_DROPOUTS = ("p", "dropout", "attention_dropout", "hidden_dropout", "dropout_rate", "dropout_prob")


class Net(nn.Module):
    """q, k, v on one read, o behind them, a head: what PEFT gets to adapt where a whole transformer is not needed."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D_IN, 10, bias=False), nn.Linear(D_IN, 6), nn.Linear(D_IN, 8, bias=False)
        self.o, self.head = nn.Linear(24, D_IN), nn.Linear(D_IN, 7)
        self.config = {"model_type": "net", "tie_word_embeddings": False}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.o(torch.cat([torch.tanh(self.q(x)), self.k(x), self.v(x)], -1)))


def lora(**options: Any) -> peft.LoraConfig:
    """An adapter for q, v, o of `Net`: ranks 3 and 5, B not zero, scale not 1."""
    defaults = {"r": 3, "lora_alpha": 4, "target_modules": ["q", "v", "o"], "rank_pattern": {"v": 5}}
    return peft.LoraConfig(**{**defaults, "init_lora_weights": False, **options})


def net(**options: Any) -> Any:
    """`Net` in float64 and train mode, with one adapter that PEFT made trainable."""
    return peft.get_peft_model(Net(), lora(**options)).double().train()


def family(name: str) -> Any:
    """A small transformer in float64 and train mode; its LoRA trains, and no dropout is active."""
    model = lora_model(name, dropout=0.0).double().train()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key)
    for module in model.modules():
        for key in _DROPOUTS:
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    return model


def compiled(model: Any, inner: str = "aot_eager", fullgraph: bool = True, **options: Any) -> Any:
    """The model under our backend; `aot_eager` because it compiles fast."""
    return torch.compile(model, backend="flora", options={"flora.inner": inner, **options}, fullgraph=fullgraph)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*(shape or (2, 5)), D_IN, dtype=dtype)


def loss(output: Any) -> Tensor:
    """A fixed random weighting: behind a layer norm, a mean square would have no gradient."""
    output = output if isinstance(output, Tensor) else output[0]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (output * weights.to(output.dtype)).sum()


def backward(call: Any, *args: Any, **kwargs: Any) -> float:
    """The loss of one forward and backward."""
    value = loss(call(*args, **kwargs))
    value.backward()
    return value.item()


def assert_same_gradients(model: nn.Module, reference: nn.Module, rtol: float = 1e-9) -> None:
    """Each gradient is the reference's; where that has none, it is absent or zero; a frozen parameter has none."""
    expected = dict(reference.named_parameters())
    trained = 0
    for name, parameter in model.named_parameters():
        grad, wanted = parameter.grad, expected[name].grad
        if not parameter.requires_grad:
            assert grad is None, name
        elif wanted is None or not wanted.any():
            assert grad is None or not grad.any(), name
        else:
            assert grad is not None, name
            assert (grad - wanted).norm() <= rtol * wanted.norm(), name
            trained += 1
    assert trained > 0


def assert_trains_as(call: Any, model: nn.Module, reference: nn.Module, *args: Any, **kwargs: Any) -> None:
    """One forward and backward of both: equal losses, equal gradients."""
    for module in (model, reference):
        module.zero_grad()
    found, expected = backward(call, *args, **kwargs), backward(reference, *args, **kwargs)
    assert abs(found - expected) <= 1e-12 * abs(expected)
    assert_same_gradients(model, reference)


def assert_right(call: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """What is compiled trains as an unfused copy of the live model does."""
    assert_trains_as(call, model, twin(model), *args, **kwargs)


def assert_equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def twin(model: Any) -> Any:
    """A copy that nothing fuses."""
    return copy.deepcopy(model)


def fused_report(adapters: int | None = None) -> FusionReport:
    """The backend's last report, in which adapters were fused: so many, or some."""
    report = last_report()
    assert report is not None
    assert len(report.fused) == adapters if adapters is not None else report.fused
    return report


def compilations() -> int:
    """How many graphs Dynamo has made since its last reset."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@contextmanager
def no_compilation() -> Iterator[None]:
    before = compilations()
    yield
    assert compilations() == before


def assert_stored_once(model: nn.Module) -> None:
    """No matrix is stored twice: a pack that is alive holds parameters, and fewer than `ALIGNED` rows besides."""
    gc.collect()
    held: Counter[int] = Counter()
    for parameter in model.parameters():
        held[parameter.untyped_storage().data_ptr()] += parameter.nbytes
    packs: Iterable[Tensor] = (packed for call in list(_calls) for packed in call._tensors if packed is not None)
    for pack in packs:
        if pack.dim() == 2:
            assert pack.nbytes - held[pack.untyped_storage().data_ptr()] < ALIGNED * pack[0].nbytes
    for parameter in model.parameters():
        if parameter.dim() == 2:
            storage = parameter.untyped_storage()
            row = max(parameter.shape) * parameter.itemsize
            assert storage.nbytes() - held[storage.data_ptr()] < ALIGNED * row
