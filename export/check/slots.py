"""Compare an export whose rows choose their adapter with its model under each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.errors import require

from ..lora.layers import tuner_layers
from ..run.decoder import Decoder
from .differences import Differences

__all__ = ["adapted", "check_slots"]

Run = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]
"""Tokens [1, seq], mask [1, total], cache -> PyTorch's logits and cache."""


def check_slots(decoder: Decoder, model: nn.Module, run: Run, differences: Differences) -> None:
    """Compare a batch in which each row has another adapter, the first none: the end of a prompt, and the next token.

    No more than that: in half precision the largest of many differences is rounding, in PyTorch as well.

    Args:
        decoder: of the export.
        model: the unfused transformers model, with PEFT's layers.
        run: runs it.
        differences: told of those that are found.

    Raises:
        ExportError: they do not agree.
    """
    transformers = require("transformers", "hf")
    names = [None, *(slot.name for slot in decoder.slots if slot.name)]
    random = torch.Generator().manual_seed(0)
    two = torch.randint(0, decoder.manifest.vocab_size, (2, 7), generator=random)
    ids = two.repeat(-(-len(names) // 2), 1)[: len(names)]
    mask = torch.ones_like(ids)
    for row in range(len(names)):
        mask[row, : row % 4] = 0  # prompts of several lengths
    tokens = torch.randint(0, decoder.manifest.vocab_size, (len(names), 1), generator=random)
    longer = torch.cat([mask, torch.ones_like(tokens)], 1)

    logits = decoder(ids, mask, adapters=names)
    past = decoder.new_cache(adapters=names)
    past.begin(len(ids))
    past.prefill(ids, mask, room=1)
    following = past.decode(tokens[:, 0].tolist()).cpu()
    for row, name in enumerate(names):
        told = "no adapter" if name is None else f"the adapter {name!r}"
        one = slice(row, row + 1)
        with adapted(model, name):
            expected, cache = run(ids[one], mask[one], transformers.DynamicCache())
            after, _ = run(tokens[one], longer[one], cache)
        differences.add(f"the logits of a prompt with {told}", logits[one, -1], expected[:, -1])
        differences.add(f"the logits of the next token with {told}", following[one], after[:, -1])


@contextmanager
def adapted(model: nn.Module, name: str | None) -> Iterator[None]:
    """Let one of a private model's adapters be active, or none; all are in the end."""
    layers = [*tuner_layers(model).values()]
    before = [list(layer.active_adapters) for layer in layers]
    for layer in layers:
        if name is None:
            layer.enable_adapters(enabled=False)
        else:
            layer.set_adapter(name)
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.enable_adapters(enabled=True)
            layer.set_adapter(active)
