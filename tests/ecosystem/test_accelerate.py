"""A loop over accelerate's Accelerator trains a model compiled with flora as it trains the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.ecosystem.lora_training import ADAPTERS, DEBUG, assert_same, batch, copies, fused_adapters, trainable_llama


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)  # one per process, and it remembers the precision
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(model: Any, when: str, mixed_precision: str = "no") -> list[float]:
    """Three steps of two batches each, gradients clipped; the losses. ``when``: compiled before or after prepare()."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=mixed_precision)
    if when == "before":
        model = torch.compile(model, backend="flora", options=DEBUG)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2, eps=1e-3))
    if when == "after":
        model = torch.compile(model, backend="flora", options=DEBUG)
    losses = []
    for seed in range(6):
        with accelerator.accumulate(model):
            loss = model(**batch(seed)).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, 0.5)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerator_trains_the_same_adapters(when: str) -> None:
    expected, model = trainable_llama(), trainable_llama()
    base = copies(model, trained=False)
    losses = train(expected, "never")
    assert train(model, when) == pytest.approx(losses, rel=1e-5)
    assert len(fused_adapters()) == ADAPTERS
    assert_same(copies(model, trained=True), copies(expected, trained=True), 1e-5)
    assert_same(copies(model, trained=False), base, 0.0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerator_with_bf16(when: str) -> None:
    expected, model = trainable_llama(), trainable_llama()
    losses = train(expected, "never", "bf16")
    assert train(model, when, "bf16") == pytest.approx(losses, rel=1e-2)
    assert len(fused_adapters()) == ADAPTERS
