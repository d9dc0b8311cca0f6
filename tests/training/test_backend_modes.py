"""Modes of training: dropout, shapes that vary, autocast, checkpointing, accumulation, graph breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flora_fx import Reason
from flora_fx.backend import last_report
from tests.architectures import example_inputs
from tests.training.tuned import (
    Net,
    assert_equal,
    assert_right,
    assert_same_gradients,
    assert_trains_as,
    backward,
    compilations,
    compiled,
    family,
    fused_report,
    inputs,
    lora,
    loss,
    net,
    twin,
)


def test_active_dropout_is_declined_and_eval_fuses() -> None:
    model, x = net(lora_dropout=0.4), inputs()
    call = compiled(model)
    for _ in range(2):  # back and forth on one compiled model
        model.train()
        torch.manual_seed(3)
        found = backward(call, x)
        reference = twin(model)
        reference.zero_grad()
        torch.manual_seed(3)
        assert abs(found - backward(reference, x)) < 1e-10
        assert_same_gradients(model, reference)
        model.zero_grad()
        model.eval()
        assert_right(call, model, x)
        model.zero_grad()


def test_the_report_names_active_dropout() -> None:
    model, x = net(lora_dropout=0.4), inputs()
    compiled(model)(x)
    report = last_report()
    assert report is not None
    assert not report.fused
    assert {decline.reason for decline in report.declines} == {Reason.DROPOUT_ACTIVE}
    model.eval()
    compiled(model)(x)
    assert not fused_report(3).declines


def test_evaluation_between_training_steps_under_no_grad_and_inference_mode() -> None:
    model, x = net(), inputs()
    call = compiled(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        assert_right(call, model, x)
        optimizer.step()
        for mode in (torch.no_grad(), torch.inference_mode()):
            model.eval()
            with mode:
                assert_equal(call(x), twin(model)(x))
            model.train()


@pytest.mark.parametrize("first", ["no_grad", "inference_mode"])
def test_a_model_that_ran_without_gradients_first_trains_afterwards(first: str) -> None:
    model, x = net(), inputs()
    call = compiled(model)
    with getattr(torch, first)():
        assert_equal(call(x), twin(model)(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        assert_right(call, model, x)
        optimizer.step()


def test_twenty_lengths_cost_at_most_two_compilations() -> None:
    model = net()
    call, reference = compiled(model), twin(model)
    for length in range(2, 22):
        assert_trains_as(call, model, reference, inputs(2, length))
    assert compilations() <= 2
    fused_report(3)


def test_lengths_of_a_transformer_cost_at_most_two_compilations() -> None:
    model = family("llama")
    call, reference = compiled(model), twin(model)
    for length in (5, 7, 6, 9, 4, 11, 8):
        assert_trains_as(call, model, reference, input_ids=torch.randint(3, 97, (2, length)), use_cache=False)
    assert compilations() <= 2
    fused_report(14)


def test_a_dimension_marked_dynamic_compiles_once() -> None:
    model = net()
    call, reference = compiled(model), twin(model)
    for length in (5, 3, 8):
        x = inputs(2, length)
        torch._dynamo.mark_dynamic(x, 1)
        assert_trains_as(call, model, reference, x)
    assert compilations() == 1
    fused_report(3)


class Broken(Net):
    """The graph breaks between the projections and what reads them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.cat([torch.tanh(self.q(x)), self.k(x), self.v(x)], -1)
        torch._dynamo.graph_break()
        return self.head(x + self.o(h))


def test_graph_breaks_are_tolerated() -> None:
    import peft

    model = peft.get_peft_model(Broken(), lora()).double()
    call = compiled(model, fullgraph=False)
    reference = twin(model)
    for _ in range(2):
        assert_trains_as(call, model, reference, inputs())
    assert compilations() >= 2
    fused_report(1)  # o, behind the break; q and v are before it


class Autocast(torch.nn.Module):
    """Autocast inside of what is compiled."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast_fuses_and_errs_no_more_than_eager(where: str) -> None:
    """Judged by the distance to float64, since which roundings happen differs between the two."""
    exact = net()
    model, x = twin(exact).float(), inputs()
    eager, low = twin(model), x.float()
    wrapped = Autocast(model) if where == "inside" else model
    call = compiled(wrapped)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "outside"):
        output = call(low)
    assert not fused_report(3).declines
    with torch.autocast("cpu", torch.bfloat16):
        expected = eager(low)
    assert output.dtype == expected.dtype == torch.bfloat16
    for value in (output.float(), expected.float(), exact(x)):
        loss(value).backward()
    assert _error(output, exact(x)) <= 2 * _error(expected, exact(x)) + 1e-3
    found, unfused = dict(model.named_parameters()), dict(eager.named_parameters())
    for key, parameter in exact.named_parameters():
        if parameter.grad is None:
            assert found[key].grad is None, key
            continue
        assert found[key].grad.dtype == torch.float32, key
        assert _error(found[key].grad, parameter.grad) <= 2 * _error(unfused[key].grad, parameter.grad) + 1e-3, key


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_gradient_checkpointing_is_right() -> None:
    """Not as one graph: transformers calls requires_grad_ on the embeddings, which Dynamo cannot return (2.13)."""
    model = family("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    reference, call = twin(model), compiled(model, fullgraph=False)
    for _ in range(2):
        assert_trains_as(call, model, reference, **example_inputs("llama"), use_cache=False)
    fused_report()


class Checkpointed(Net):
    """A projection group recomputed in the backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch.utils.checkpoint import checkpoint

        return self.head(checkpoint(super().forward, x, use_reentrant=False) @ self.head.weight)


def test_a_checkpointed_region_around_adapters_is_right() -> None:
    import peft

    model = peft.get_peft_model(Checkpointed(), lora()).double()
    assert_trains_as(compiled(model), model, twin(model), inputs())
    fused_report(3)


def test_accumulation_clipping_and_scaling() -> None:
    model = net().float()
    reference = twin(model)
    call = compiled(model)
    runs: list[tuple[Any, Any]] = [(model, call), (reference, reference)]
    batches = [inputs(2, 5, dtype=torch.float32) for _ in range(6)]
    for m, run in runs:
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for micro in range(0, len(batches), 2):
            for batch in batches[micro : micro + 2]:
                scaler.scale(loss(run(batch)) / 2).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    expected = dict(reference.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[key], rtol=0, atol=1e-6, msg=key)


def test_two_forwards_before_one_backward() -> None:
    model = net()
    call, reference, (x, y) = compiled(model), twin(model), (inputs(), inputs())
    (loss(call(x)) * loss(call(y))).backward()
    (loss(reference(x)) * loss(reference(y))).backward()
    assert_same_gradients(model, reference)


def test_retain_graph_gives_the_gradient_twice() -> None:
    model = net()
    reference = twin(model)
    x = inputs()
    for run in (compiled(model), reference):
        value = loss(run(x))
        value.backward(retain_graph=True)
        value.backward()
    assert_same_gradients(model, reference)
