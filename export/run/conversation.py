"""Several turns of one text: the keys and values of earlier turns are not computed again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Unpack

import torch
from torch import Tensor

from ..directory.manifest import Manifest
from ..tokens.ending import Ending
from ..tokens.options import GenerationOptions, plan
from ..tokens.stream import TokenStream
from .continuing import checked_prompt, continuation
from .text_cache import TextCache, left_padded

__all__ = ["Conversation"]


class Conversation:
    """A text of one row or more that goes on for several turns. `Decoder.start` makes one.

    Each turn's new tokens, and the answer to them, are put behind all that was said before. The answer is that to the
    whole text, run again; but what is in the cache already is not run again. All of it is, where it has to be: another
    prompt went through the decoder meanwhile, the adapter was replaced, rotary positions change (LongRoPE), rows of a
    batch got answers of different lengths.

    A turn whose stream is left early ends with the last token that was taken.

    Args:
        cache: of a decoder, that keeps what it ran.
        manifest: of the decoder.
        name: of the decoder, to be shown.

    Attributes:
        rows: the tokens of each row so far, answers included; padding is not in there.

    >>> chat = decoder.start()  # doctest: +SKIP
    >>> for question in questions:  # doctest: +SKIP
    ...     ids = tokenizer(question, return_tensors="pt").input_ids
    ...     print(tokenizer.decode(chat.generate(ids, max_new_tokens=100)[0]))
    """

    def __init__(self, cache: TextCache, manifest: Manifest, *, name: str) -> None:
        self.rows: list[list[int]] = []
        self._cache = cache
        self._manifest = manifest
        self._name = name
        self._turn = 0

    def __repr__(self) -> str:
        return f"Conversation({self._name}, {[len(row) for row in self.rows]} tokens)"

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Unpack[GenerationOptions]
    ) -> Tensor:
        """Answer a turn.

        Args:
            input_ids: [batch, turn], integers: what is new; shorter rows are padded on the left.
            attention_mask: [batch, turn]; 0 where padded. None for no padding.
            options: as for `Decoder.generate`.

        Returns:
            the answer alone, [batch, new], int64.

        Raises:
            TypeError, ValueError: an argument that cannot be; another number of rows than before; a text that is longer
                now than the model has positions. The conversation stays as it was.
            ExportError: ONNX Runtime fails.
        """
        return torch.stack(list(self.stream(input_ids, attention_mask, **options)), 1)

    def stream(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Unpack[GenerationOptions]
    ) -> TokenStream:
        """As `generate`, one token of every row at a time. Arguments are checked at once, not at the first token.

        It ends with a RuntimeError where the next turn, or another prompt, has begun before its last token.
        """
        ids, mask = checked_prompt(input_ids, attention_mask, self._manifest.vocab_size)
        if self.rows and len(ids) != len(self.rows):
            raise ValueError(f"input_ids has {len(ids)} rows; this conversation has {len(self.rows)}")
        before = self.rows or [[] for _ in ids]
        rows = [[*old, *new[kept.bool()].tolist()] for old, new, kept in zip(before, ids, mask, strict=True)]
        text, kept = left_padded(rows)
        planned = plan(options, self._manifest, text, kept)
        self._turn += 1
        tokens, ending = continuation(self._cache, text, kept, planned, self._manifest.max_positions)
        return TokenStream(self._noted(tokens, ending, rows, self._turn), ending)

    def _noted(self, tokens: Iterator[Tensor], ending: Ending, rows: list[list[int]], turn: int) -> Iterator[Tensor]:
        """The tokens of an answer, each put behind its row unless that has ended."""
        while True:
            if turn != self._turn:
                raise RuntimeError("the next turn of this conversation has begun; finish a stream before that")
            token = next(tokens, None)
            if token is None:
                return
            self.rows = rows  # only now that the turn could be run
            for row, ended, new in zip(rows, ending.ended, token.tolist(), strict=True):
                if not ended:
                    row.append(new)
            yield token
