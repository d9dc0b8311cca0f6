"""An encoder that learns to tell texts apart: the mean of its tokens' states, normalised, and a linear head.

Its upper half, to be exact: the layers below stay as they are for every method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora_fx.checkpoint import load_model

from ..data import Example
from .upper import States, divided, read, token_states

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


def features(encoder: Any, texts: Sequence[Tensor], device: str) -> Tensor:
    """What a head reads [batch, hidden]: the mean state of each text, of length √hidden.

    Args:
        encoder: upper layers, with or without adapters.
        texts: the states [length, hidden] that these begin with.
        device: that the encoder is on.
    """
    states, owner = token_states(encoder, texts, device)
    # Not `index_add`, which is not deterministic on a GPU. The mean's length is taken out, so a sum will do.
    total = F.one_hot(owner, len(texts)).T.to(states.dtype) @ states
    return F.normalize(total, dim=-1) * math.sqrt(total.shape[-1])


class Classifier(nn.Module):
    """An encoder with a head.

    Args:
        encoder: see `features`.
        head: what the linear layer begins with.
        states: what the encoder begins with, by the tokens of a text.
    """

    def __init__(self, encoder: nn.Module, head: Head, states: States) -> None:
        super().__init__()
        self.encoder = encoder
        self.states = states
        self.head = nn.Linear(head.weight.shape[1], head.weight.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(head.weight)
            self.head.bias.copy_(head.bias)

    def forward(self, examples: Sequence[Example], device: str) -> Tensor:
        """Logits [batch, labels]."""
        texts = [self.states[example.prompt] for example in examples]
        logits: Tensor = self.head(features(self.encoder, texts, device))
        return logits


@dataclass(frozen=True)
class Classification:
    """An encoder that learns to label texts. An example's answer is the label's index.

    Every method begins with the head that logistic regression finds on the frozen encoder's features, so that what is
    trained is what an adapter adds to these; the head goes on learning at a rate that is the same for all.

    Attributes:
        directory: of the encoder.
        layers: that learn, the uppermost ones.
        heads: by task.
        states: files of `upper.kept`, by task.
    """

    directory: str
    layers: int = 3
    heads: Mapping[str, Head] = field(default_factory=dict, repr=False)
    states: Mapping[str, Path] = field(default_factory=dict, repr=False)
    task_type: str = "FEATURE_EXTRACTION"
    code: tuple[Path, ...] = (
        Path(__file__),
        Path(__file__).with_name("frozen.py"),
        Path(__file__).with_name("upper.py"),
    )
    head_rate: float = 1e-3

    def encoder(self) -> nn.Module:
        """The whole encoder in float32."""
        from transformers.utils import logging

        logging.disable_progress_bar()
        encoder: Any = load_model(self.directory, dtype=torch.float32, task="encoder")
        encoder.pooler = None  # nobody reads what it makes of the first token
        return encoder

    def load(self) -> nn.Module:
        """Its upper layers."""
        return divided(self.encoder(), self.layers)[1]

    def model(self, adapted: nn.Module, task: str) -> nn.Module:
        return Classifier(adapted, self.heads[task], _read(self.states[task]))

    def loss(self, model: Any, examples: Sequence[Example], device: str) -> Tensor:
        """Cross entropy of the labels."""
        return F.cross_entropy(model(examples, device), _labels(examples).to(device))

    def right(self, model: Any, examples: Sequence[Example], device: str) -> int:
        """How many texts have their label as the likeliest one."""
        return int((model(examples, device).argmax(-1).cpu() == _labels(examples)).sum())


_read = cache(read)


def _labels(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([example.answer[0] for example in examples])
