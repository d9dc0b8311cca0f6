"""What ``generate`` returns: tokens, and where more is wanted, how they were chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Generated", "Record", "Streamer", "gather", "record_for"]


class Streamer(Protocol):
    """What ``generate(streamer=...)`` calls; transformers' streamers are such."""

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each token."""

    def end(self) -> None:
        """There will be no more."""


@dataclass(frozen=True)
class Generated:
    """What ``generate(return_dict_in_generate=True)`` returns, as transformers names it.

    Attributes:
        sequences: [batch, prompt + new], int64.
        scores: of each new token, [batch, vocab], float32: what it was chosen by, after every rule and, in sampling,
            temperature and cuts (-inf for what could not be). With ``output_scores``.
        logits: the same as the model returned it. With ``output_logits``.
        logprobs: [batch, new], float32: the log-probability of each new token under ``scores``, 0 for what follows the
            end of a row, so that the sum is that of the row. With ``output_logprobs``.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    logprobs: Tensor | None = None


class Record:
    """Collects what `Generated` holds, token by token.

    Args:
        scores, logits, logprobs: which of it.
    """

    def __init__(self, *, scores: bool, logits: bool, logprobs: bool) -> None:
        self.scores: list[Tensor] | None = [] if scores else None
        self.logits: list[Tensor] | None = [] if logits else None
        self.logprobs: list[Tensor] | None = [] if logprobs else None

    def add(self, logits: Tensor, scores: Tensor, token: Tensor, ended: Tensor) -> None:
        """One step: logits and scores [batch, vocab], tokens [batch], and which rows had ended, [batch].

        The logits may be written to by the next run; the scores are no one else's.
        """
        if self.logits is not None:
            self.logits.append(logits.clone())
        if self.scores is not None:
            self.scores.append(scores)
        if self.logprobs is not None:
            # What pads a row may be no column.
            chosen = scores.log_softmax(-1).gather(1, token.clamp(max=scores.shape[-1] - 1)[:, None])[:, 0]
            self.logprobs.append(chosen.masked_fill(ended, 0.0))

    def result(self, sequences: Tensor) -> Generated:
        """All of it, with the tokens."""
        return Generated(
            sequences,
            None if self.scores is None else tuple(self.scores),
            None if self.logits is None else tuple(self.logits),
            None if self.logprobs is None else torch.stack(self.logprobs, 1),
        )


def record_for(*, wanted: bool, scores: bool, logits: bool, logprobs: bool) -> Record | None:
    """A record of what is wanted beside the tokens; None for nothing.

    Raises:
        ValueError: scores, logits or log-probabilities of a ``generate`` that returns tokens alone.
    """
    if not wanted and (scores or logits or logprobs):
        name = "output_scores" if scores else "output_logits" if logits else "output_logprobs"
        raise ValueError(f"{name}=True needs return_dict_in_generate=True: otherwise the tokens alone are returned")
    return Record(scores=scores, logits=logits, logprobs=logprobs) if wanted else None


def gather(
    prompt: Tensor, stream: Iterator[Tensor], streamer: Streamer | None, record: Record | None
) -> Tensor | Generated:
    """All tokens of a stream [batch] behind its prompt [batch, prompt], with what was recorded beside them."""
    if streamer is not None:
        streamer.put(prompt)
    new = []
    for token in stream:
        new.append(token)
        if streamer is not None:
            streamer.put(token)
    if streamer is not None:
        streamer.end()
    sequences = torch.cat([prompt, torch.stack(new, 1)], 1)
    return sequences if record is None else record.result(sequences)
