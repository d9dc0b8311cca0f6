"""A tiny Llama with a PEFT LoRA on every projection, ready to train, and what its tests look at."""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor, nn

from flora_fx import Reason
from flora_fx.backend import last_report
from tests.architectures import VOCAB

ADAPTERS = 7
"""Of a layer: q, k, v, o, gate, up, down."""
DEBUG = {"flora.inner": "aot_eager"}
"""Compiles fast; `test_trainer.py` goes through Inductor, too."""


def trainable_llama(dtype: torch.dtype = torch.float32, layers: int = 1, dropout: float = 0.0) -> Any:
    """The same weights at each call: B is not zero, v has a rank of its own, A and B require gradients."""
    torch.manual_seed(7)
    config = hf.LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        use_cache=False,
    )
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        lora_dropout=dropout,
        target_modules="all-linear",
        init_lora_weights=False,
        rank_pattern={".*v_proj": 6},
    )
    return peft.get_peft_model(hf.LlamaForCausalLM(config), lora, autocast_adapter_dtype=False).to(dtype).train()


def batch(seed: int, rows: int = 2) -> dict[str, Tensor]:
    """Token ids that are labels, too."""
    ids = torch.randint(3, VOCAB, (rows, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def copies(model: nn.Module, *, trained: bool) -> dict[str, Tensor]:
    """Copies of the parameters that train, or of those that do not, by their names without compilers' prefixes."""
    return {
        name.replace("_orig_mod.", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad == trained
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients, by the parameters' names."""
    return {
        name.replace("_orig_mod.", "").removeprefix("module."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Tensor by tensor, within a share of the largest entry of each."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error, scale = float((found[name] - value).abs().max()), float(value.abs().max())
        assert error <= tolerance * scale, f"{name} is off by {error:.1e} of {scale:.1e}"


def fused_adapters() -> tuple[str, ...]:
    """What the backend fused last, as its report names it."""
    report = last_report()
    return () if report is None else report.fused


def declined() -> set[Reason]:
    """Why the backend declined what it declined last."""
    report = last_report()
    return set() if report is None else {decline.reason for decline in report.declines}
