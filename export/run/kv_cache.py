"""Keys and values between the runs of a decoder: one class for each target of an export, with the same methods.

general    past [batch, kv_heads, n, head_dim] -> present [batch, kv_heads, n + 1, head_dim], prompts padded on the left
decoder    one buffer [batch, kv_heads, capacity, head_dim] is past and present, prompts padded on the right
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from flora_fx.errors import ExportError

from ..directory.manifest import Manifest
from ..tokens.logits import Logits
from .kv_memory import PAST, PRESENT, BatchMemory, SharedMemory, too_many
from .session import Session, Value

__all__ = ["GrowingCache", "KeyValues", "SharedCache"]


class KeyValues(Protocol):
    """Runs one prompt, and then what follows it, on a graph; unchecked."""

    def choose(self, slots: Sequence[int]) -> None:
        """Let each row of the next prompt take the adapter in a slot, -1 for none; empty where rows have no choice."""

    def score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [batch, seq, vocab] of a whole prompt; see `prefill`. At padding they mean nothing."""

    def prefill(self, ids: Tensor, mask: Tensor, room: int) -> Logits:
        """Run a prompt.

        Args:
            ids: [batch, seq], int64, on the CPU; shorter rows are padded on the left.
            mask: [batch, seq], int64, on the CPU; 0 where padded.
            room: at most so many calls of `decode` follow.

        Returns:
            logits of the next token; the next run may overwrite them.

        Raises:
            ValueError: more tokens than the model has positions.
            ExportError: ONNX Runtime fails.
        """

    def decode(self, tokens: list[int]) -> Logits:
        """Run one more token of each row; returns and raises as `prefill`.

        Raises:
            RuntimeError: another prompt took the memory.
        """

    def extend(self, ids: Tensor) -> Logits:
        """Run more tokens [batch, n] of each row; returns and raises as `decode`."""

    @property
    def held(self) -> bool:
        """Whether keys and values of the last run are still there."""

    def claim(self) -> None:
        """Make sure that they are.

        Raises:
            RuntimeError: another prompt took the memory.
        """

    def takes(self, count: int, room: int) -> bool:
        """Whether `extend` can run so many more tokens of each row, and ``room`` calls of `decode` follow."""


class GrowingCache:
    """Each run returns keys and values that are longer than those it got. Use one per prompt.

    Args:
        session: of a graph whose target is ``"general"``.
        manifest: of the graph.
    """

    def __init__(self, session: Session, manifest: Manifest) -> None:
        self._session = session
        self._limit = manifest.max_positions
        self._past = {name: name.replace(PAST, PRESENT) for name in manifest.inputs if name.startswith(PAST)}
        self._mask = torch.empty(0)
        self._values: dict[str, Value] = {}

    def choose(self, slots: Sequence[int]) -> None:
        """See `KeyValues.choose`; graphs of this kind have one adapter."""

    def score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See `KeyValues.score`."""
        self._mask = mask
        self._values = {name: self._session.empty(name, {"batch": ids.shape[0], "past": 0}) for name in self._past}
        return self._run(ids)

    def prefill(self, ids: Tensor, mask: Tensor, room: int) -> Logits:
        """See `KeyValues.prefill`."""
        return Logits(self.score(ids, mask)[:, -1])

    def decode(self, tokens: list[int]) -> Logits:
        """See `KeyValues.decode`."""
        return self.extend(torch.tensor(tokens)[:, None])

    @property
    def held(self) -> bool:
        """See `KeyValues.held`."""
        return bool(self._values)

    def claim(self) -> None:
        """See `KeyValues.claim`; the memory is its own."""

    def takes(self, count: int, room: int) -> bool:
        """See `KeyValues.takes`; it grows as needed."""
        return True

    def extend(self, ids: Tensor) -> Logits:
        """See `KeyValues.extend`."""
        new = self._mask.new_ones(*ids.shape)
        if self._limit and self._mask.shape[1] >= self._limit:  # a row at the last position stays there, unseen
            new[self._mask.sum(1) >= self._limit] = 0
        self._mask = torch.cat([self._mask, new], 1)
        return Logits(self._run(ids)[:, -1])

    def _run(self, ids: Tensor) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": self._mask, **self._values}
        try:
            outputs = self._session.run(inputs, keep=list(self._past.values()))
        except ExportError as error:
            longest = int(self._mask.sum(1).max())
            if self._limit and longest > self._limit:  # learned positions end there; rotary ones would go on
                raise too_many(longest, self._limit) from error
            raise
        self._values = {past: outputs[present] for past, present in self._past.items()}
        return outputs["logits"]


class SharedCache:
    """Keys and values stay where they are, and each run writes the new ones behind them.

    All prompts of a decoder share one memory: `prefill` overwrites what another prompt left there.

    Args:
        memory: of the decoder.
    """

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self._batch: BatchMemory
        self._lengths: list[int] = []
        self._slots: Sequence[int] = ()

    def choose(self, slots: Sequence[int]) -> None:
        """See `KeyValues.choose`."""
        self._slots = slots

    def score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See `KeyValues.score`; zeros at padding."""
        ids, packed = _pad_right(ids, mask)
        logits = self._prompt(ids, packed, 0).cpu()
        scores = logits.new_zeros(*mask.shape, logits.shape[-1])
        scores[mask.bool()] = logits[packed.bool()]
        return scores

    def prefill(self, ids: Tensor, mask: Tensor, room: int) -> Logits:
        """See `KeyValues.prefill`."""
        ids, mask = _pad_right(ids, mask)
        logits = self._prompt(ids, mask, room)
        lengths = mask.sum(1)
        self._lengths = lengths.tolist()
        self._batch.fill(mask)
        return Logits(logits[torch.arange(len(ids)), lengths - 1])

    def decode(self, tokens: list[int]) -> Logits:
        """See `KeyValues.decode`."""
        self.claim()
        # A row at the last position stays there, overwritten.
        places = [min(length, self._memory.limit - 1) for length in self._lengths]
        logits = self._batch.step(tokens, places)
        self._lengths = [place + 1 for place in places]
        return logits

    @property
    def held(self) -> bool:
        """See `KeyValues.held`."""
        return self._memory.belongs_to(self)

    def claim(self) -> None:
        """See `KeyValues.claim`."""
        if not self.held:
            raise RuntimeError(
                "another prompt went through this decoder, and the keys and values of this stream are gone; finish a "
                "stream before the next one begins, or load the export twice"
            )

    def takes(self, count: int, room: int) -> bool:
        """See `KeyValues.takes`; several tokens of one row only: GroupQueryAttention on CPUs takes no more."""
        one = count == 1 or len(self._lengths) == 1
        return one and self._memory.wanted(max(self._lengths) + count, room) <= self._batch.capacity

    def extend(self, ids: Tensor) -> Logits:
        """See `KeyValues.extend`."""
        if ids.shape[1] == 1:
            return self.decode(ids[:, 0].tolist())
        self._lengths = [length + ids.shape[1] for length in self._lengths]
        mask = (torch.arange(self._batch.capacity) < torch.tensor(self._lengths)[:, None]).long()
        self._batch.fill(mask)
        return Logits(self._batch.prompt.run_with({"input_ids": ids, "attention_mask": mask}, "logits")[:, -1])

    def _prompt(self, ids: Tensor, mask: Tensor, room: int) -> Tensor:
        batch, length = ids.shape
        self._batch = self._memory.lend(self, batch, length, room, self._slots)
        # Without room: a mask as long as the prompt is what tells GroupQueryAttention that nothing is before it.
        return self._batch.prompt.run_with({"input_ids": ids, "attention_mask": mask}, "logits")


def _pad_right(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and mask [batch, longest row]: in each row what the mask has, in its order, then padding.

    >>> _pad_right(torch.tensor([[0, 0, 5, 6], [0, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]))
    (tensor([[5, 6, 0],
            [7, 8, 9]]), tensor([[1, 1, 0],
            [1, 1, 1]]))
    """
    order = mask.argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    return ids.gather(1, order), mask.gather(1, order)
