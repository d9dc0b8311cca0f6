"""transformers' Trainer trains a model compiled with flora as it trains the model itself, in float32 and bf16.

It cannot compile with flora on its own: accelerate, behind it, takes the backends of a fixed list only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from flora_fx import backend
from tests.ecosystem.lora_training import ADAPTERS, DEBUG, assert_same, batch, copies, fused_adapters, trainable_llama

DATA = [{name: value[0] for name, value in batch(seed, rows=1).items()} for seed in range(6)]
OPTIONS = {"aot_eager": DEBUG, "Inductor": None}


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_last", None)


def train(model: Any, folder: Path, **arguments: Any) -> tuple[Any, list[float]]:
    """Three steps; the trainer and the loss of each step."""
    settings = hf.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        adam_epsilon=1e-3,  # else a gradient that is rounding alone becomes a whole step
        report_to=[],
        disable_tqdm=True,
        **arguments,
    )
    trainer = hf.Trainer(model, settings, train_dataset=DATA)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_trainer_trains_and_saves_the_same_adapters(options: dict[str, Any] | None, tmp_path: Path) -> None:
    expected, model = trainable_llama(), trainable_llama()
    start, base = copies(model, trained=True), copies(model, trained=False)
    _, losses = train(expected, tmp_path)
    model.compile(backend="flora", options=options)
    trainer, found = train(model, tmp_path)
    assert len(fused_adapters()) == ADAPTERS
    assert found == pytest.approx(losses, rel=1e-5)
    assert_same(copies(model, trained=True), copies(expected, trained=True), 1e-5)
    assert not any(torch.equal(value, start[name]) for name, value in copies(model, trained=True).items())
    assert_same(copies(model, trained=False), base, 0.0)

    trainer.save_model(str(tmp_path))
    assert_same(load_file(tmp_path / "adapter_model.safetensors"), peft.get_peft_model_state_dict(model), 0.0)


def test_trainer_with_bf16(tmp_path: Path) -> None:
    _, losses = train(trainable_llama(), tmp_path, bf16=True)
    model = trainable_llama()
    model.compile(backend="flora", options=DEBUG)
    _, found = train(model, tmp_path, bf16=True)
    assert len(fused_adapters()) == ADAPTERS
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert found == pytest.approx(losses, rel=1e-2)


@pytest.mark.xfail(raises=ValueError, strict=True, reason="accelerate 1.15 takes the backends of a fixed list only")
def test_backend_named_in_the_training_arguments(tmp_path: Path) -> None:
    train(trainable_llama(), tmp_path, torch_compile=True, torch_compile_backend="flora")
    assert len(fused_adapters()) == ADAPTERS
