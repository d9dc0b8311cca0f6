"""What takes turns in the latency suite: anything that generates."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Contender"]


class Contender(Protocol):
    """One form of the model under one runner, with its KV cache.

    Logits may be overwritten by the next call.
    """

    @property
    def compiled(self) -> bool:
        """Whether Dynamo compiled it, so that a profile has to show it."""

    @property
    def note(self) -> str:
        """What readers of its figures should know; empty for nothing."""

    def prefill(self, prompt: Tensor) -> Tensor:
        """Start a new sequence: tokens [batch, prompt] on the settings' device -> logits [batch, vocabulary]."""

    def decode(self, token: Tensor) -> Tensor:
        """Go on by one token, [batch, 1], whatever its value -> logits [batch, vocabulary]."""
