"""Quantized checkpoints of tiny models, written as other tools lay them out, and the same weights in floating point."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import encoders
from .encoders import Parts

Encoder = Callable[[int, int, int], tuple[Parts, Tensor]]
"""(out, in, seed) -> the parts of a layer by the ends of their keys, and its weight in float32."""


def gptq(**settings: Any) -> tuple[Encoder, dict[str, Any]]:
    v2 = settings.get("v2", False)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    return lambda n, k, seed: encoders.gptq(n, k, seed=seed, **settings), config


def awq() -> tuple[Encoder, dict[str, Any]]:
    return lambda n, k, seed: encoders.awq(n, k, seed=seed), {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "version": "gemm",
    }


def compressed(**settings: Any) -> tuple[Encoder, dict[str, Any]]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    return lambda n, k, seed: encoders.compressed(n, k, seed=seed, **settings), config


def bitsandbytes(kind: str = "nf4", double: bool = True) -> tuple[Encoder, dict[str, Any]]:
    """As bitsandbytes serializes its states: the library writes, for it is installed where this is used."""
    import bitsandbytes as bnb

    def encode(n: int, k: int, seed: int) -> tuple[Parts, Tensor]:
        weight = 0.1 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
        settings = {"blocksize": 32, "quant_type": kind, "compress_statistics": double}
        codes, state = bnb.functional.quantize_4bit(weight.to(torch.bfloat16), **settings)
        parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        state.dtype = torch.float32
        return {"weight": codes, **parts}, bnb.functional.dequantize_4bit(codes, state)

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return encode, config


def tiny(**settings: Any) -> nn.Module:
    """A Llama whose projections are of different sizes."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=97, **settings)
    torch.manual_seed(11)
    return transformers.LlamaForCausalLM(config).eval()


def write(model: nn.Module, folder: Path, encoder: Encoder, settings: dict[str, Any]) -> nn.Module:
    """Save a model with its layers' projections quantized; returns it with their dequantized weights, in float64."""
    model.save_pretrained(folder)  # type: ignore[operator]
    tensors = load_file(folder / "model.safetensors")
    for seed, (name, layer) in enumerate(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            parts, weight = encoder(layer.out_features, layer.in_features, seed)
            del tensors[f"{name}.weight"]
            tensors.update({f"{name}.{key}": value for key, value in parts.items()})
            layer.weight.data = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config=settings)
    return model.double()


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
