"""Compare an exported causal LM that is too large to stand in memory with its model: both by parts.

All of the graph runs, and each weight is read once: on a prompt, on a token behind keys and values, and on both
sides of the lengths of `crossing`. What is left out is greedy generation, which takes many runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..directory.manifest import Manifest
from ..run.kv_memory import PAST
from .crossing import Signature, find_crossings, text_input
from .decoder import precision, run_model
from .differences import Check, Differences
from .layered import Layered, Run, in_float32
from .parts import Parts

__all__ = ["check_quickly"]


@dataclass(frozen=True)
class _Text:
    """The last tokens of a text, in each row of a batch."""

    batch: int
    total: int
    new: int

    def __str__(self) -> str:
        return "a prompt" if self.total == self.new else f"token {self.total} of a text"


def check_quickly(path: Path, manifest: Manifest, model: nn.Module, providers: Sequence[Any], *, wide: bool) -> Check:
    """Compare logits.

    Args:
        path: of the graph.
        manifest: of it.
        model: the unfused transformers model in the export's dtype, in eval mode.
        providers: see `Session`.
        wide: compute in float32 what the graph has in bfloat16.

    Raises:
        ExportError: they do not agree.
    """
    parts = Parts(path, "logits", providers=providers, wide=wide)
    signature = parts.signature
    crossings = find_crossings(signature, manifest, model, by_layer=True)
    short = min(7, manifest.max_positions or 7)
    texts = [_Text(2, short, short), *(_Text(2, short, 1) for _ in range(short > 1))]
    texts += [_Text(1, total, 1) for total in crossings.totals]
    given = [partial(_input, signature, manifest, text) for text in texts]
    found = parts.run(given)
    differences = Differences(precision(manifest))
    with in_float32(model, manifest.layers) as layered:
        expected = layered.run([_reference(layered, signature, manifest, text) for text in texts])
    for text, logits, wanted in zip(texts, found, expected, strict=True):
        differences.add(f"the logits of {text}", logits, wanted)
    return Check(
        differences.max_abs,
        differences.max_rel,
        None,
        parts.provider,
        crossings.crossed,
        crossings.not_crossed,
        verified="quick",
    )


def _input(signature: Signature, manifest: Manifest, text: _Text, name: str) -> Tensor:
    return text_input(signature, manifest, name, text.batch, text.total, text.new)


def _reference(layered: Layered, signature: Signature, manifest: Manifest, text: _Text) -> Run:
    """PyTorch's logits, with the keys and values of one layer in memory."""
    from transformers import DynamicCache

    cache = DynamicCache()
    pasts = [name for name in signature if name.startswith(PAST)]
    names = list(zip(pasts[::2], pasts[1::2], strict=True))

    def put(index: int) -> None:
        layer = cache.layers[index]
        layer.keys, layer.values = (_input(signature, manifest, text, name).float() for name in names[index])

    def take(index: int) -> None:
        layer = cache.layers[index]
        layer.keys, layer.values = (torch.zeros(()).expand(x.shape) for x in (layer.keys, layer.values))

    def run() -> Tensor:
        for index in range(len(names) if text.total > text.new else 0):
            one = torch.zeros(text.batch, manifest.kv_heads, 1, manifest.head_dim)
            cache.update(one, one, index)
            layer = cache.layers[index]
            layer.keys = layer.values = one[:, :, :1].expand(-1, -1, text.total - text.new, -1)
            if not layered.layers:
                put(index)
        ids, mask = (_input(signature, manifest, text, name) for name in ("input_ids", "attention_mask"))
        return run_model(layered.model, ids, mask, cache)[0]

    return Run(run, put, take) if text.total > text.new else Run(run)
