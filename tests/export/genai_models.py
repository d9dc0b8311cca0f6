"""A small model as onnxruntime-genai's own builder writes it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

from flora_fx.export import Manifest
from flora_fx.export.run.decoder import Decoder
from flora_fx.export.run.session import Session
from tests.made_once import made_once

VOCAB, POSITIONS = 97, 600


@dataclass(frozen=True)
class Built:
    """A model, and the graph that the builder made of it, in a directory with its ``genai_config.json``."""

    model: Any
    graph: Path

    def decoder(self, provider: str = "CPUExecutionProvider") -> Decoder:
        runs = Session(self.graph, providers=[provider], cuda_graph=provider == "CUDAExecutionProvider")
        return Decoder(runs, self.manifest(runs, "decoder"))

    def manifest(self, runs: Session, target: Any) -> Manifest:
        return Manifest(
            kind="causal-lm",
            architecture="LlamaForCausalLM",
            dtype="float32",
            inputs=list(runs.inputs),
            outputs=runs.outputs,
            target=target,
            layers=2,
            kv_heads=2,
            head_dim=16,
            vocab_size=VOCAB,
            max_positions=POSITIONS,
        )

    def expected(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        config = transformers.GenerationConfig(**{"do_sample": False, "pad_token_id": 0, **options})
        mask = torch.ones_like(ids) if mask is None else mask
        tokens: Tensor = self.model.generate(ids, attention_mask=mask, generation_config=config)
        return tokens


def build_by_genai(place: Path) -> Built:
    """A random Llama, written by the model builder of onnxruntime-genai."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # layers must say more than the token itself, or a sequence repeats one token
                parameter.normal_(0, (0.3 if "emb" in name else 4.0) / parameter.shape[-1] ** 0.5)
    made_once(place, lambda place: _write(model, place))
    model.generation_config.eos_token_id = None  # the builder wants one
    return Built(model, place / "graph" / "model.onnx")


def _write(model: Any, place: Path) -> None:
    model.save_pretrained(place / "model")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(place / "model")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(place / "model")]
    command += ["-o", str(place / "graph"), "-p", "fp32", "-e", "cpu", "-c", str(place / "cache")]
    done = subprocess.run([*command, "--extra_options", "hf_token=false"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
