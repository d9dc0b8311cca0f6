"""The small Llama that is fine-tuned: pretrained on the spot, once, on a mixture of sequence tasks."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flora_fx.measuring.method import pinned

from ..measure.isolated import Progress
from .data import Example
from .descent import scheduled, step
from .generation import Generation, batch_of
from .tasks import LENGTH, PRETRAINING, SYMBOLS, VOCABULARY, example

__all__ = ["Pretraining", "pretrained"]


@dataclass(frozen=True)
class Pretraining:
    """Shape and training of the small model.

    Attributes:
        hidden: size.
        intermediate: size.
        layers: decoder layers.
        heads: of the attention, with half as many for keys and values.
        steps: of AdamW, each on new examples.
        batch: examples.
        rate: the highest learning rate.
        seed: of weights and examples.
    """

    hidden: int = 96
    intermediate: int = 256
    layers: int = 3
    heads: int = 4
    steps: int = 3000
    batch: int = 64
    rate: float = 3e-3
    seed: int = 0


def pretrained(settings: Pretraining, folder: Path, progress: Progress) -> Path:
    """The small model's directory, as ``save_pretrained`` writes it; trained if it is not there, or not whole.

    Args:
        settings: shape and training. The directory is named after these, the first examples, and torch's version.
        folder: that it lies in.
        progress: called with the steps done and in all.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    drawn = random.Random(settings.seed)
    first = [_draw(drawn) for _ in range(settings.batch)]
    identity = json.dumps([asdict(settings), first, torch.__version__])
    directory = folder / f"accuracy-base-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if directory.is_dir():
        progress(settings.steps, settings.steps)
        return directory
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=settings.hidden,
            intermediate_size=settings.intermediate,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads // 2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )
    with pinned(1):  # sums do not depend on the number of cores
        _train(model, settings, progress)
    unfinished = directory.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    unfinished.rename(directory)
    return directory


def _train(model: Any, settings: Pretraining, progress: Progress) -> None:
    drawn = random.Random(settings.seed)
    learner = Generation("")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=0.0)
    for index in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * scheduled(index, settings.steps)
        step(optimizer, learner.loss(model, *batch_of([_draw(drawn) for _ in range(settings.batch)])))
        progress(index + 1, settings.steps)


def _draw(drawn: random.Random) -> Example:
    return example(drawn.choice(list(PRETRAINING)), drawn.choices(range(SYMBOLS), k=LENGTH))
