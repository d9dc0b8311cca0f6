"""One memory for the keys and values of all prompts of a decoder, bound once as past and as present."""

from __future__ import annotations

import itertools
import math
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flora_fx.mixed.selection import ADAPTER_IDS

from ..directory.manifest import Manifest
from ..tokens.logits import Logits
from .buffer import Buffer
from .session import Binding, Session

__all__ = ["PAST", "PRESENT", "BatchMemory", "SharedMemory", "too_many"]

PAST, PRESENT = "past_key_values.", "present."
"""How the names of keys and values begin, going in and coming out."""

_STEP = 256  # tokens; a capacity is a multiple


class SharedMemory:
    """Keys and values of every layer, and what a decode step reads and returns: allocated once, bound once per batch.

    Kept from prompt to prompt, and allocated anew only for more bytes than ever before.

    Args:
        session: of a graph whose target is ``"decoder"``.
        manifest: of the graph.
        further: what is bound in every run besides, see `Session.bind`.

    Attributes:
        limit: the model's positions.
        buffers: by the names of the inputs, and ``logits``.
    """

    def __init__(
        self, session: Session, manifest: Manifest, further: Mapping[str, tuple[Buffer, Sequence[int]]]
    ) -> None:
        self._owner: Callable[[], object] = lambda: None
        self.limit = manifest.max_positions or sys.maxsize
        self.buffers: dict[str, Buffer] = {}
        self._session = session
        self._manifest = manifest
        self._further = further
        self._batches: dict[int, BatchMemory] = {}
        self._graphs = itertools.count(1)  # never reused: a captured graph reads and writes the addresses it saw

    def belongs_to(self, owner: object) -> bool:
        """Whether the keys and values in it are this owner's."""
        return self._owner() is owner

    def lend(self, owner: object, batch: int, prompt: int, room: int, slots: Sequence[int] = ()) -> BatchMemory:
        """Give the memory to an owner, in the shape [batch, kv_heads, capacity, head_dim]; the owner before loses it.

        Args:
            owner: whoever runs a prompt.
            batch: rows.
            prompt, room: how many tokens there are, and how many may be added. The capacity is for both, as far as
                the model's positions go.
            slots: of the adapter of each row, -1 for none; empty for none in any row, or where rows have no choice.

        Raises:
            ValueError: a longer prompt than the model has positions.
        """
        if prompt > self.limit:
            raise too_many(prompt, self.limit)
        self._owner = weakref.ref(owner)  # weak: both are freed at once where neither is used any more
        wanted = self.wanted(prompt, room)
        found = self._batches.get(batch)
        if found is None or found.capacity < wanted:
            found = self._batches[batch] = self._shaped(batch, min(-(-wanted // _STEP) * _STEP, self.limit))
        if self._manifest.slots:
            rows = self.buffers[ADAPTER_IDS]
            rows.host((batch,), torch.int64).copy_(torch.tensor(slots or [-1] * batch))
            rows.upload()
        return found

    def wanted(self, prompt: int, room: int) -> int:
        """The capacity for so many tokens and so many more, as far as the model's positions go."""
        return min(prompt + room, self.limit)

    def _shaped(self, batch: int, capacity: int) -> BatchMemory:
        session, manifest = self._session, self._manifest
        past = [name for name in manifest.inputs if name.startswith(PAST)]
        sizes = {
            "input_ids": (batch, 1),
            "attention_mask": (batch, capacity),
            "logits": (batch, 1, manifest.vocab_size),
            **dict.fromkeys(past, (batch, manifest.kv_heads, capacity, manifest.head_dim)),
        }
        if manifest.slots:
            sizes[ADAPTER_IDS] = (batch,)
        shapes = {name: _known(session.signature[name][0], size) for name, size in sizes.items()}
        self._allocate(shapes)
        places = {name: (self.buffers[name], shape) for name, shape in shapes.items()}
        kept = {name: places[name] for name in (*past, ADAPTER_IDS) if name in places}
        present = {name.replace(PAST, PRESENT): places[name] for name in past}
        _, _, vocab = shapes["logits"]
        return BatchMemory(
            self.buffers,
            (batch, capacity, vocab),
            session.signature["logits"][1],
            prompt=session.bind({**kept, **present, **self._further}),
            step=session.bind({**places, **present, **self._further}, graph=next(self._graphs)),
        )

    def _allocate(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            size = math.prod(shape) * self._session.signature[name][1].itemsize
            if name not in self.buffers or len(self.buffers[name]) < size:
                self._batches.clear()  # they are bound to the old memory, and keep it alive
                self.buffers.pop(name, None)
                self.buffers[name] = self._session.buffer(size)


class BatchMemory:
    """The memory in the shape of one batch.

    The mask is as long as the capacity, with as many ones as a row has tokens, and is written in place. A step takes
    0.99 to 1.01 of what it takes with a mask of the exact length, bound anew each time (1 and 4 rows, capacities of 256
    to 8192, 4 layers of SmolLM-135M's shape, ONNX Runtime 1.31, CPU). And a CUDA graph has one shape.

    Args:
        buffers: by the names of the inputs, and ``logits``.
        sizes: batch, capacity, vocabulary.
        dtype: of the logits.
        prompt: bound to keys and values only.
        step: bound to tokens [batch, 1], mask [batch, capacity], keys, values, and logits [batch, 1, vocab].

    Attributes:
        capacity: tokens that a row can hold.
    """

    def __init__(
        self,
        buffers: Mapping[str, Buffer],
        sizes: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        prompt: Binding,
        step: Binding,
    ) -> None:
        batch, self.capacity, vocab = sizes
        self.prompt = prompt
        self._step = step
        self._written = buffers["input_ids"], buffers["attention_mask"]
        self._read = buffers["logits"]
        self._logits = Logits(self._read.nearest((batch, vocab), dtype))
        tokens, self._mask = (
            buffer.host(shape, torch.int64)
            for buffer, shape in zip(self._written, ((batch,), (batch, self.capacity)), strict=True)
        )
        # Written through these: where each step streams the weights through the processor's caches, an operation of
        # torch on one number takes 30 µs (2 µs in a loop of its own), and this takes 6.
        self._put_token, self._put_mask = tokens.numpy().data, self._mask.numpy().data

    def fill(self, mask: Tensor) -> None:
        """Begin with the mask [batch, seq] of a prompt."""
        self._mask.zero_()
        self._mask[:, : mask.shape[1]] = mask

    def step(self, tokens: list[int], lengths: list[int]) -> Logits:
        """Run one token of each row, in the place behind so many."""
        for row, token in enumerate(tokens):
            self._put_token[row] = token
        for place in enumerate(lengths):
            self._put_mask[place] = 1
        for buffer in self._written:
            buffer.upload()
        self._step.run()
        self._read.download()
        return self._logits


def _known(axes: Sequence[int | str], sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of a tensor; those that the graph knows are the graph's."""
    return tuple(axis if isinstance(axis, int) else size for axis, size in zip(axes, sizes, strict=True))


def too_many(tokens: int, limit: int) -> ValueError:
    """The error of a prompt that is longer than its model has positions."""
    return ValueError(f"the prompt has {tokens} tokens; this model has {limit} positions")
