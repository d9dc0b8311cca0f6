"""Logits of the next token, where they are."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Logits"]


class Logits:
    """What a run returned for the last token of each row: still on the session's device, read by these methods.

    Args:
        tensor: [batch, vocab], floating point, on any device. The next run may write to it.

    >>> Logits(torch.tensor([[0.1, 2.0, 0.3]])).likeliest()
    tensor([1])
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        plain = tensor.device.type == "cpu" and tensor.dtype == torch.float32
        self._array = tensor.detach().numpy() if plain else None

    def cpu(self) -> Tensor:
        """All of them, on the CPU."""
        return self.tensor.cpu()

    def likeliest(self) -> Tensor:
        """The token with the largest logit, [batch], int64, on the CPU: all that is copied there."""
        if self._array is not None:
            # Of 49,152 logits on one thread: torch (2.13) takes 42 µs, numpy 3 µs.
            return torch.from_numpy(self._array.argmax(-1))
        if self.tensor.device.type == "cpu":
            return Logits(self.tensor.float()).likeliest()  # half precision takes 200 µs in both
        return self.tensor.argmax(-1).cpu()
