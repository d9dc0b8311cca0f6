"""An encoder that learns to tell texts apart: the mean of its tokens' states, normalised, and a linear head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora_fx.checkpoint import load_model

from ..data import Example

__all__ = ["Classification", "Classifier", "Head", "features"]


@dataclass(frozen=True)
class Head:
    """A linear head.

    Attributes:
        weight: [labels, hidden], float32.
        bias: [labels].
    """

    weight: Tensor
    bias: Tensor


def features(encoder: Any, examples: Sequence[Example], device: str) -> Tensor:
    """What a head reads [batch, hidden]: the mean state of each text, of length √hidden.

    Args:
        encoder: a transformers encoder, with or without adapters.
        examples: their prompts are the texts.
        device: that the encoder is on.
    """
    length = max(len(example.prompt) for example in examples)
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, example in enumerate(examples):
        tokens[row, : len(example.prompt)] = torch.tensor(example.prompt)
        mask[row, : len(example.prompt)] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    states: Tensor = encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
    mean = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    return F.normalize(mean, dim=-1) * math.sqrt(mean.shape[-1])


class Classifier(nn.Module):
    """An encoder with a head.

    Args:
        encoder: see `features`.
        head: what the linear layer begins with.
    """

    def __init__(self, encoder: nn.Module, head: Head) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(head.weight.shape[1], head.weight.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(head.weight)
            self.head.bias.copy_(head.bias)

    def forward(self, examples: Sequence[Example], device: str) -> Tensor:
        """Logits [batch, labels]."""
        logits: Tensor = self.head(features(self.encoder, examples, device))
        return logits


@dataclass(frozen=True)
class Classification:
    """An encoder that learns to label texts. An example's answer is the label's index.

    Every method begins with the head that logistic regression finds on the frozen encoder's features, so that what is
    trained is what an adapter adds to these; the head goes on learning at a rate that is the same for all.

    Attributes:
        directory: of the encoder.
        heads: by task.
    """

    directory: str
    heads: Mapping[str, Head] = field(default_factory=dict, repr=False)
    task_type: str = "FEATURE_EXTRACTION"
    code: tuple[Path, ...] = (Path(__file__), Path(__file__).with_name("frozen.py"))
    head_rate: float = 1e-3

    def load(self) -> nn.Module:
        from transformers.utils import logging

        logging.disable_progress_bar()
        encoder: Any = load_model(self.directory, dtype=torch.float32, task="encoder")
        encoder.pooler = None  # nobody reads what it makes of the first token
        return encoder

    def model(self, adapted: nn.Module, task: str) -> nn.Module:
        return Classifier(adapted, self.heads[task])

    def loss(self, model: Any, examples: Sequence[Example], device: str) -> Tensor:
        """Cross entropy of the labels."""
        return F.cross_entropy(model(examples, device), _labels(examples).to(device))

    def right(self, model: Any, examples: Sequence[Example], device: str) -> int:
        """How many texts have their label as the likeliest one."""
        return int((model(examples, device).argmax(-1).cpu() == _labels(examples)).sum())


def _labels(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([example.answer[0] for example in examples])
