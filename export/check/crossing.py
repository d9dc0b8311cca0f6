"""Compare an export with its model on both sides of each length where something in it may change.

A text of thousands of tokens would take minutes. One step takes as long as any other: the keys and values before it are
random numbers, the same ones for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.mixed.selection import ADAPTER_IDS

from ..directory.manifest import Manifest
from ..run.kv_memory import PAST
from ..trace.text_config import text_config
from .differences import Differences

__all__ = ["Crossings", "Signature", "Step", "compare_steps", "find_crossings", "step_inputs", "text_input"]

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

Signature = Mapping[str, tuple[tuple[int | str, ...], torch.dtype]]
"""Shapes, with names for dynamic axes, and dtypes of a graph's inputs."""

Step = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]
"""Tokens [batch, seq], mask [batch, total], cache -> PyTorch's logits and cache."""


@dataclass(frozen=True)
class Crossings:
    """Where something may change.

    Attributes:
        lengths: after so many tokens.
        crossed: those of them that are compared.
        totals: the steps that are compared: each the last token of a text of so many.
    """

    lengths: tuple[int, ...]
    crossed: tuple[int, ...]
    totals: tuple[int, ...]

    @property
    def not_crossed(self) -> tuple[int, ...]:
        """Those whose keys and values would have taken too much memory."""
        return tuple(length for length in self.lengths if length not in self.crossed)


def find_crossings(signature: Signature, manifest: Manifest, model: nn.Module, *, by_layer: bool = False) -> Crossings:
    """The lengths of a model, and which steps are compared: the last of n tokens and the last of n + 1, for each n.

    Not those whose keys and values take more memory than a quarter of the weights, and more than 64 MiB.

    Args:
        signature: of the graph's inputs.
        manifest: of the export.
        model: the transformers model.
        by_layer: the keys and values of one layer are in memory at a time; then they may take 64 MiB.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    room = _ALWAYS * manifest.layers if by_layer else max(_ALWAYS, weights // _SHARE)
    lengths = _lengths(manifest, model)
    crossed = [length for length in lengths if _bytes(signature, length) <= room]
    most = manifest.max_positions
    totals = [total for length in crossed for total in (length, length + 1) if total <= (most or total)]
    return Crossings(lengths, tuple(crossed), tuple(totals))


def _lengths(manifest: Manifest, model: nn.Module) -> tuple[int, ...]:
    most = manifest.max_positions
    named = _integers(text_config(model).to_dict())
    return tuple(sorted({length for length in (*manifest.switches, *named) if 1 < length <= (most or length)}))


def _integers(content: Any) -> Iterator[int]:
    """The lengths in a config, wherever they are."""
    for name, value in content.items() if isinstance(content, dict) else ():
        if name in _NAMES and isinstance(value, int) and not isinstance(value, bool):
            yield value
        yield from _integers(value)


def _past(signature: Signature, length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the keys and values of so many tokens of one row."""
    sizes = {"batch": 1, "past": length}
    return {
        name: (tuple(axis if isinstance(axis, int) else sizes[axis] for axis in shape), dtype)
        for name, (shape, dtype) in signature.items()
        if name.startswith(PAST)
    }


def _bytes(signature: Signature, length: int) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in _past(signature, length).values())


def step_inputs(signature: Signature, manifest: Manifest, total: int) -> dict[str, Tensor]:
    """What an export is given for the last token of a text: that one, a mask, and the keys and values before it."""
    return {name: text_input(signature, manifest, name, 1, total, 1) for name in signature}


def text_input(signature: Signature, manifest: Manifest, name: str, batch: int, total: int, new: int) -> Tensor:
    """An input of an export for the last tokens of a text. It is random, and for the same text always the same.

    What is kept in half precision is rounded to it, whatever dtype the graph that is checked has.

    Args:
        signature: of the graph's inputs.
        manifest: of the export.
        name: of the input.
        batch: how many rows.
        total: how long the text is.
        new: how many of its tokens are given; before them are keys and values.
    """
    random = torch.Generator().manual_seed(1000 * total + list(signature).index(name))
    shape, dtype = signature[name]
    if name.startswith(PAST):
        sizes = [axis if isinstance(axis, int) else {"batch": batch, "past": total - new}[axis] for axis in shape]
        return torch.randn(sizes, generator=random).to(getattr(torch, manifest.dtype)).to(dtype)
    if name == "input_ids":
        return torch.randint(0, manifest.vocab_size, (batch, new), generator=random)
    if name == ADAPTER_IDS:
        return torch.full((batch,), -1)  # none
    return torch.ones(batch, total, dtype=torch.int64)


def compare_steps(
    found: Mapping[int, Tensor],
    signature: Signature,
    manifest: Manifest,
    model: nn.Module,
    step: Step,
    differences: Differences,
) -> None:
    """Compare what an export made of `step_inputs` with what its model makes of them.

    Args:
        found: the export's logits [1, 1, vocab], by the length of the text.
        signature: of the graph's inputs.
        manifest: of the export.
        model: the transformers model.
        step: one run of it.
        differences: told of those that are found.

    Raises:
        ExportError: they do not agree.
    """
    from transformers import DynamicCache

    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    for total, logits in found.items():
        inputs = step_inputs(signature, manifest, total)
        token, mask = inputs["input_ids"], inputs["attention_mask"]
        placed = [inputs[name].to(weight.device, weight.dtype) for name in signature if name.startswith(PAST)]
        expected, _ = step(token, mask, DynamicCache(list(zip(placed[::2], placed[1::2], strict=True))))
        differences.add(f"the logits of token {total} of a text", logits[:, -1], expected[:, -1])
