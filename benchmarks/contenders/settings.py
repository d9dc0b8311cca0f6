"""What is measured: one model shape with one adapter, on one device."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

__all__ = ["DTYPES", "PROJECTIONS", "SHAPES", "Settings"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES: dict[str, dict[str, object]] = {
    "smollm-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": _LLAMA3_ROPE,
    },
    "llama-3.2-3b": {
        "model_type": "llama",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": _LLAMA3_ROPE,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": _LLAMA3_ROPE | {"factor": 8.0},
    },
    "llama-3.1-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": _LLAMA3_ROPE | {"factor": 8.0},
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
    },
    "gpt2": {
        "model_type": "gpt2",
        "hidden_size": 768,
        "n_inner": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
        "vocab_size": 50257,
        "max_position_embeddings": 1024,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "max_position_embeddings": 2048,
    },
}
"""Published configurations by name (``tiny`` is for tests); embedding and head are tied in all models made of them."""


@dataclass(frozen=True)
class Settings:
    """One model, one adapter, one device.

    Attributes:
        shape: a name of `SHAPES`.
        layers: decoder layers; 0 for the shape's own depth.
        dtype: a name of `DTYPES`, of the base and of the adapter.
        rank: of the LoRA; its alpha is twice that.
        targets: the projections that carry one.
        batch: sequences.
        threads: CPU threads.
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError: an unknown name, or a number that is not positive.
    """

    shape: str = "smollm-135m"
    layers: int = 0
    dtype: str = "float32"
    rank: int = 16
    targets: tuple[str, ...] = PROJECTIONS
    batch: int = 1
    threads: int = 2
    device: str = "cpu"

    def __post_init__(self) -> None:
        choices: list[tuple[str, str, Collection[str]]] = [
            ("shape", self.shape, SHAPES),
            ("dtype", self.dtype, DTYPES),
            ("device", self.device, ("cpu", "cuda")),
            *(("target", target, PROJECTIONS) for target in self.targets),
        ]
        for name, value, known in choices:
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; it must be one of {', '.join(known)}")
        for name in ("rank", "batch", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.layers < 0 or not self.targets:
            raise ValueError("layers must not be negative, and there must be a target")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is 'cuda', and torch sees no CUDA device here")

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return self.layers or int(str(SHAPES[self.shape]["num_hidden_layers"]))

    @property
    def vocabulary(self) -> int:
        """Tokens that there are."""
        return int(str(SHAPES[self.shape]["vocab_size"]))

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]
