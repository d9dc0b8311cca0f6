"""Choose the next token from logits, as transformers does: temperature, then top-k, then top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        do_sample: draw from the distribution; otherwise, or with temperature 0, the likeliest is taken.
        temperature: logits are divided by it.
        top_k: keep the k likeliest; None or 0 for all.
        top_p: keep the likeliest whose probabilities sum to at least p.
        generator: of the random numbers; None for torch's global one.

    Raises:
        ValueError, TypeError: a value that means nothing.

    >>> Sampling()(torch.tensor([[0.1, 2.0, 0.3]]))
    tensor([1])
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise TypeError(f"do_sample is {self.do_sample!r}; it must be True or False")
        for name, value in (("temperature", self.temperature), ("top_p", self.top_p)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} is {value!r}; it must be a number")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (the likeliest token) or more")
        if self.top_k is not None and (isinstance(self.top_k, bool) or not isinstance(self.top_k, int)):
            raise TypeError(f"top_k is {self.top_k!r}; it must be a whole number, or None for all tokens")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be positive, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of each row.

        Args:
            logits: [batch, vocab].

        Returns:
            [batch], int64.
        """
        if not self.do_sample or self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(self.warp(logits.float()).softmax(-1), 1, generator=self.generator).squeeze(-1)

    def warp(self, logits: Tensor) -> Tensor:
        """Logits [batch, vocab] over the temperature, -inf where top-k or top-p leaves a token out."""
        logits = logits / self.temperature
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ascending, order = logits.sort(descending=False)
            unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            unlikely[..., -1:] = False
            logits = logits.masked_fill(unlikely.scatter(-1, order, unlikely), -torch.inf)
        return logits
