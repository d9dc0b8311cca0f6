"""Choose the next token from logits, as transformers does.

temperature -> top-k -> top-p -> min-p -> draw; without sampling, the likeliest

Whole vocabularies are numpy's. Many of torch's operators wake OpenMP's threads for that many numbers, and these wait
actively for milliseconds afterwards, on the cores that the next run needs: a token that was drawn took 5.7 ms more than
a greedy one, and takes 0.4 (``python -m benchmarks generation``, 2 cores).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .logits import Logits

__all__ = ["Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        do_sample: draw from the distribution; otherwise, or with temperature 0, the likeliest is taken.
        temperature: logits are divided by it.
        top_k: keep the k likeliest; None or 0 for all.
        top_p: keep the likeliest whose probabilities sum to at least p.
        min_p: keep those that are at least p times as likely as the likeliest; None or 0 for all.
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
    min_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise TypeError(f"do_sample is {self.do_sample!r}; it must be True or False")
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if (name, value) == ("min_p", None):
                continue
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
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be from 0 to 1, or None for all tokens")

    @property
    def draws(self) -> bool:
        """Whether there is chance in it."""
        return self.do_sample and self.temperature > 0

    def __call__(self, logits: Tensor | Logits) -> Tensor:
        """The next token of each row.

        Args:
            logits: [batch, vocab], on any device.

        Returns:
            [batch], int64, on the CPU.
        """
        logits = logits if isinstance(logits, Logits) else Logits(logits)
        if not self.draws:
            return logits.likeliest()
        return self.choose(logits.cpu().float())

    def choose(self, logits: Tensor) -> Tensor:
        """One token per row, [batch], of what `warp` leaves of logits [batch, vocab] on the CPU."""
        scores, tokens = self._candidates(logits)
        chosen = _draw(scores.softmax(-1), self.generator)
        return chosen if tokens is None else tokens.gather(1, chosen[:, None]).squeeze(1)

    def warp(self, logits: Tensor) -> Tensor:
        """Logits [batch, vocab] over the temperature, -inf where top-k, top-p or min-p leaves a token out."""
        scores, tokens = self._candidates(logits)
        if tokens is None:
            return scores
        # amax: what fills a row up is no token.
        return torch.full_like(logits, -torch.inf).scatter_reduce(1, tokens, scores, "amax")

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [batch, candidates], and which tokens these are; None for the whole vocabulary."""
        scaled = logits.detach().numpy() / self.temperature
        if not self.top_k or self.top_k >= logits.shape[-1]:
            return self._cut(torch.from_numpy(scaled)), None
        scores, tokens = _top(scaled, self.top_k)
        return self._cut(scores), tokens

    def _cut(self, scores: Tensor) -> Tensor:
        """-inf, in place, where top-p or min-p leaves a token out; of equal ones at the border of top-p any of them."""
        rows = scores.numpy()
        if self.top_p < 1:
            for row in rows:
                order = row.argsort()
                sums = torch.from_numpy(row[order]).softmax(-1).cumsum(-1).numpy()
                unlikely = int((sums <= 1 - self.top_p).sum())
                row[order[: min(unlikely, len(row) - 1)]] = -torch.inf
        if self.min_p:
            probabilities = scores.softmax(-1).numpy()
            rows[probabilities < self.min_p * probabilities.max(-1, keepdims=True)] = -torch.inf
        return scores


def _top(scores: Any, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row and those that equal the last of them, in the vocabulary's order.

    Args:
        scores: an array [batch, vocab].
        k: below the size of the vocabulary.

    Returns:
        their scores, and who they are: [batch, k or more] each; rows with fewer are filled with -inf and 0.
    """
    ranked = scores.copy()
    ranked.partition(-k, axis=-1)
    tokens = [torch.from_numpy(row.nonzero()[0]) for row in ~(scores < ranked[:, -k, None])]
    found = [torch.from_numpy(row)[which] for row, which in zip(scores, tokens, strict=True)]
    padded = nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-torch.inf)
    return padded, nn.utils.rnn.pad_sequence(tokens, batch_first=True)


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token per row, [batch], by where a random number falls between the sums of the probabilities so far.

    Of 49,152 that takes 0.1 ms, and ``multinomial`` (torch 2.13) 1 ms: it draws a number for each.
    """
    sums = probabilities.cumsum(-1)
    above_0 = 1 - torch.rand(len(sums), 1, generator=generator)  # so that what is drawn has a probability above 0, too
    return torch.searchsorted(sums, above_0 * sums[:, -1:]).squeeze(-1)
