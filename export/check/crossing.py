"""Compare an export with its model on both sides of each length where something in it may change.

A text of thousands of tokens would take minutes. One step takes as long as any other: the keys and values before it are
random numbers, the same ones for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..lora.slots import ADAPTER_IDS
from ..run.decoder import Decoder
from ..run.kv_memory import PAST, PRESENT
from ..trace.text_config import text_config
from .differences import Differences

__all__ = ["check_crossings"]

_NAMES = (
    "sliding_window",
    "attention_chunk_size",
    "floor_scale",
    "original_max_position_embeddings",
    "max_position_embeddings",
)
"""Of configs: lengths where masks, rotary positions or the scale of attention change, or positions end."""

_ALWAYS = 64 * 2**20
_SHARE = 4

Step = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]
"""Tokens [batch, seq], mask [batch, total], cache -> PyTorch's logits and cache."""


def check_crossings(
    decoder: Decoder, model: nn.Module, step: Step, differences: Differences
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Compare the last of n tokens and the last of n + 1, for each n where something may change.

    Args:
        decoder: of the export.
        model: the transformers model.
        step: one run of it.
        differences: told of those that are found.

    Returns:
        each n that was crossed, and each whose keys and values would have taken too much memory: more than a quarter of
        what the weights take, and more than 64 MiB.

    Raises:
        ExportError: they do not agree.
    """
    room = max(_ALWAYS, sum(p.numel() * p.element_size() for p in model.parameters()) // _SHARE)
    lengths = _lengths(decoder, model)
    crossed = [length for length in lengths if _bytes(decoder, length) <= room]
    random = torch.Generator().manual_seed(0)
    for length in crossed:
        for total in (length, length + 1):
            if total <= (decoder.manifest.max_positions or total):
                _compare(decoder, model, step, total, random, differences)
    return tuple(crossed), tuple(length for length in lengths if length not in crossed)


def _lengths(decoder: Decoder, model: nn.Module) -> list[int]:
    most = decoder.manifest.max_positions
    named = _integers(text_config(model).to_dict())
    return sorted({length for length in (*decoder.manifest.switches, *named) if 1 < length <= (most or length)})


def _integers(content: Any) -> Iterator[int]:
    """The lengths in a config, wherever they are."""
    for name, value in content.items() if isinstance(content, dict) else ():
        if name in _NAMES and isinstance(value, int) and not isinstance(value, bool):
            yield value
        yield from _integers(value)


def _past(decoder: Decoder, length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the keys and values of so many tokens of one row."""
    sizes = {"batch": 1, "past": length}
    return {
        name: (tuple(axis if isinstance(axis, int) else sizes[axis] for axis in shape), dtype)
        for name, (shape, dtype) in decoder.session.inputs.items()
        if name.startswith(PAST)
    }


def _bytes(decoder: Decoder, length: int) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in _past(decoder, length).values())


def _compare(
    decoder: Decoder, model: nn.Module, step: Step, total: int, random: torch.Generator, differences: Differences
) -> None:
    from transformers import DynamicCache

    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    past = {
        name: torch.randn(shape, generator=random).to(dtype) for name, (shape, _) in _past(decoder, total - 1).items()
    }
    token = torch.randint(0, decoder.manifest.vocab_size, (1, 1), generator=random)
    mask = torch.ones(1, total, dtype=torch.int64)
    wide = {name: value.to(decoder.session.inputs[name][1]) for name, value in past.items()}  # of a bfloat16 export
    keep = [name.replace(PAST, PRESENT) for name in past]
    inputs: dict[str, Tensor] = {"input_ids": token, "attention_mask": mask, **wide}
    if decoder.slots:
        inputs[ADAPTER_IDS] = torch.tensor([-1])
    found = decoder.session.run(inputs, keep=keep)["logits"]
    keys_and_values = [value.to(device) for value in past.values()]
    layers = list(zip(keys_and_values[::2], keys_and_values[1::2], strict=True))
    expected, _ = step(token, mask, DynamicCache(layers))
    differences.add(f"the logits of token {total} of a text", found[:, -1], expected[:, -1])
