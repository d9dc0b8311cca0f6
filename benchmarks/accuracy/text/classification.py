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
from torch.nn.utils.rnn import pad_sequence

from ..base import load_base
from ..data import Example
from .packed import PackedTable
from .upper import divided, read

__all__ = ["Classification", "Classifier", "Head", "features", "table"]

_NEVER = -1e4
"""A logit whose probability is zero in float32, and so is its gradient."""


@dataclass(frozen=True)
class Head:
    """A linear head.

    Attributes:
        weight: [labels, hidden], float32.
        bias: [labels].
    """

    weight: Tensor
    bias: Tensor


def features(encoder: Any, states: Tensor, owner: Tensor, texts: int) -> Tensor:
    """What a head reads [texts, hidden]: the mean state of each text, of length √hidden.

    Args:
        encoder: upper layers, with or without adapters.
        states: [rows, length, hidden] that these begin with.
        owner: whose each of them is [rows, length]; see `packed`.
        texts: how many there are.
    """
    # A mask [rows, 1, length, length] goes to the attention as it is.
    found = encoder(inputs_embeds=states, attention_mask=_mask(owner, states.dtype)).last_hidden_state
    of = owner.flatten() == torch.arange(texts, device=owner.device).unsqueeze(1)
    # The mean's length is taken out, so a sum will do.
    total = of.to(states.dtype) @ found.flatten(0, 1)
    return F.normalize(total, dim=-1) * math.sqrt(total.shape[-1])


def _mask(owner: Tensor, dtype: torch.dtype) -> Tensor:
    apart = owner[:, :, None] != owner[:, None]
    return torch.zeros_like(apart, dtype=dtype).masked_fill(apart, torch.finfo(dtype).min)[:, None]


class Classifier(nn.Module):
    """An encoder with a head.

    Args:
        encoder: see `features`.
        head: what the linear layer begins with.
        labels: that it has, if more: those that the head does not know are never the answer, and learn nothing.
    """

    def __init__(self, encoder: nn.Module, head: Head, labels: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        known, features = head.weight.shape
        self.head = nn.Linear(features, max(known, labels))
        with torch.no_grad():
            self.head.weight[known:] = 0
            self.head.bias[known:] = _NEVER
            self.head.weight[:known] = head.weight
            self.head.bias[:known] = head.bias

    def forward(self, states: Tensor, owner: Tensor, texts: int) -> Tensor:
        """Logits [texts, labels]; see `features`."""
        logits: Tensor = self.head(features(self.encoder, states, owner, texts))
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
        Path(__file__).with_name("packed.py"),
        Path(__file__).with_name("upper.py"),
    )
    head_rate: float = 1e-3

    def encoder(self) -> nn.Module:
        """The whole encoder in float32."""
        encoder = load_base(self.directory, "encoder")
        encoder.pooler = None  # nobody reads what it makes of the first token
        found: nn.Module = encoder
        return found

    def load(self) -> nn.Module:
        """Its upper layers."""
        return divided(self.encoder(), self.layers)[1]

    def model(self, adapted: nn.Module, task: str) -> nn.Module:
        return Classifier(adapted, self.heads[task], max(len(head.bias) for head in self.heads.values()))

    def table(self, task: str, examples: Sequence[Example]) -> PackedTable:
        """The states that a text begins with, and its label."""
        states = _read(self.states[task])
        return table([states[example.prompt] for example in examples], [example.answer[0] for example in examples])

    def loss(self, model: Any, states: Tensor, owner: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of the labels."""
        return F.cross_entropy(model(states, owner, len(labels)), labels)

    def right(self, model: Any, states: Tensor, owner: Tensor, labels: Tensor) -> Tensor:
        """Whether a text has its label as the likeliest one."""
        found: Tensor = model(states, owner, len(labels)).argmax(-1) == labels
        return found


def table(states: Sequence[Tensor], labels: Sequence[int]) -> PackedTable:
    """A table of texts.

    Args:
        states: [length, hidden] of each text.
        labels: of each.
    """
    lengths = torch.tensor([len(text) for text in states])
    return PackedTable((pad_sequence(list(states), batch_first=True),), (torch.tensor(labels),), lengths)


_read = cache(read)
