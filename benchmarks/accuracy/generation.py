"""A causal language model that learns to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base import load_base
from .data import Example
from .table import Table

__all__ = ["Generation", "batch_of"]

_IGNORED = -100


@dataclass(frozen=True)
class Generation:
    """A causal language model that learns to continue a prompt.

    Attributes:
        directory: of the model, or its Hub id.
    """

    directory: str
    task_type: str = "CAUSAL_LM"
    code: tuple[Path, ...] = (Path(__file__),)
    head_rate: float = 0.0

    def load(self) -> nn.Module:
        found: nn.Module = load_base(self.directory, "causal-lm")
        return found

    def model(self, adapted: nn.Module, task: str) -> nn.Module:
        return adapted

    def table(self, task: str, examples: Sequence[Example]) -> Table:
        """Tokens, and which of them are the answer."""
        return Table(batch_of(examples), (), torch.tensor([len(prompt) + len(answer) for prompt, answer in examples]))

    def loss(self, model: Any, tokens: Tensor, asked: Tensor) -> Tensor:
        """On the answers' tokens alone."""
        labels = tokens.masked_fill(~asked, _IGNORED)
        loss: Tensor = model(input_ids=tokens, labels=labels, use_cache=False).loss
        return loss

    def right(self, model: Any, tokens: Tensor, asked: Tensor) -> Tensor:
        """Whether an answer is right in every token.

        The model reads the right answer and predicts each token of it from those before. If the likeliest token is
        right every time, greedy generation writes the same answer, and the other way round: up to the first error both
        read the same.
        """
        predicted = model(input_ids=tokens, use_cache=False).logits[:, :-1].argmax(-1)
        return ((predicted == tokens[:, 1:]) | ~asked[:, 1:]).all(-1)


def batch_of(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Tokens, and whether each belongs to an answer [batch, length]; padded on the right.

    No attention mask is needed: under causal attention no token sees the padding after it.

    >>> batch_of([Example((5, 6), (7,)), Example((5,), (8,))])
    (tensor([[5, 6, 7],
            [5, 8, 0]]), tensor([[False, False,  True],
            [False,  True, False]]))
    """
    length = max(len(example.prompt) + len(example.answer) for example in examples)
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    asked = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        asked[row, len(prompt) : end] = True
    return tokens, asked
