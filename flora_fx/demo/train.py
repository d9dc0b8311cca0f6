"""Train the demo's model and its adapter from nothing, and save both as ordinary checkpoints."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flora_fx.errors import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Recipe", "adapter_recipe", "base_recipe", "build_tokenizer", "train_adapter", "train_base"]

Progress = Callable[[int, int], None]
"""Called after every step with the steps done and in all."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train: windows of ``length`` tokens at random offsets, AdamW, cosine decay."""

    steps: int
    batch: int
    length: int
    learning_rate: float


def base_recipe(*, fast: bool) -> Recipe:
    """About a minute on two cores; with ``fast`` a few steps that teach nothing but run everything."""
    return Recipe(steps=4 if fast else 500, batch=8, length=32 if fast else 128, learning_rate=4e-3)


def adapter_recipe(*, fast: bool) -> Recipe:
    """The Zen is short enough to be learnt by heart in seconds."""
    return Recipe(steps=4 if fast else 240, batch=4, length=32 if fast else 96, learning_rate=6e-3)


def build_tokenizer(texts: Sequence[str], directory: Path, *, vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the texts and save it as a transformers tokenizer in `directory`."""
    tokenizers = require("tokenizers", "hf")
    transformers = require("transformers", "hf")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    wrapped.save_pretrained(directory)
    return wrapped


def train_base(
    text: str,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    recipe: Recipe,
    progress: Progress,
    *,
    seed: int,
    layers: int = 4,
) -> list[float]:
    """Train a small Llama on `text`, save it to `directory` and return the loss of every step."""
    transformers = require("transformers", "hf")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.LlamaForCausalLM(config)
    losses = _train(model, _encode(text, tokenizer, recipe), recipe, progress, seed=seed)
    model.save_pretrained(directory)
    return losses


def train_adapter(
    model: nn.Module,
    text: str,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    recipe: Recipe,
    progress: Progress,
    *,
    seed: int,
    rank: int = 16,
) -> list[float]:
    """Train a LoRA on all seven projections of `model`, save it to `directory` and return the losses."""
    peft = require("peft", "hf")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    losses = _train(adapted, _encode(text, tokenizer, recipe), recipe, progress, seed=seed)
    adapted.save_pretrained(directory)
    return losses


def _encode(text: str, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Tensor:
    """The text's token ids, repeated until at least one window fits at every token of the text."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids + [ids[i % len(ids)] for i in range(recipe.length)])


def _train(model: nn.Module, ids: Tensor, recipe: Recipe, progress: Progress, *, seed: int) -> list[float]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    offsets = random.Random(seed)
    losses: list[float] = []
    model.train()
    for step in range(recipe.steps):
        warm_up = min(1.0, (step + 1) / (0.08 * recipe.steps))
        decay = 0.05 + 0.95 * (1 + math.cos(math.pi * step / recipe.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm_up * decay
        starts = [offsets.randrange(len(ids) - recipe.length) for _ in range(recipe.batch)]
        windows = torch.stack([ids[start : start + recipe.length] for start in starts])
        output: Any = model(input_ids=windows, labels=windows, use_cache=False)
        output.loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(output.loss.detach()))
        progress(step + 1, recipe.steps)
    model.eval()
    return losses
