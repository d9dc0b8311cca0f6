"""A captured model: its program, and what its inputs and outputs are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

__all__ = ["Traced", "with_cache"]


@dataclass(frozen=True)
class Traced:
    """A captured model.

    Attributes:
        program: its graph.
        inputs, outputs: their names, in order.
        axes: names of the dynamic dimensions, by input.
        layers: how many layers have keys and values; 0 for encoders.
        kv_heads, head_dim: of the first layer's keys; 0 for encoders.
        encoder: of an encoder-decoder, the program that runs once per prompt, in front of this one.
        notes: what a reader of the export should know.
        example: inputs for the check, of other sizes than those of the capture; none for language models of tokens.
        needs_mask: see `Manifest`.
        endless: whether its positions have no end, whatever its config calls their number.
        switches: after how many tokens rotary positions change for the whole text, see `export.trace.switches`.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]]
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    encoder: Traced | None = None
    notes: tuple[str, ...] = ()
    example: Mapping[str, Tensor] = field(default_factory=dict)
    needs_mask: bool = False
    endless: bool = False
    switches: tuple[int, ...] = ()


def with_cache(
    program: ExportedProgram,
    inputs: Mapping[str, Mapping[int, str]],
    layers: int,
    kv_heads: int,
    head_dim: int,
    **more: Any,
) -> Traced:
    """A program of ``input_ids`` whose keys and values go in as past and come out as present, layer by layer.

    Args:
        program: takes ``inputs``, then a key and a value for each layer [batch, kv_heads, past, head_dim]; returns
            logits [batch, seq, vocab], then keys and values [batch, kv_heads, total, head_dim].
        inputs: names of the dynamic dimensions, by input.
        layers, kv_heads, head_dim: of keys and values.
        more: other attributes of `Traced`.
    """
    names = [f"{layer}.{which}" for layer in range(layers) for which in ("key", "value")]
    taken = {**inputs, **{f"past_key_values.{name}": {0: "batch", 2: "past"} for name in names}}
    returned = {"logits": inputs["input_ids"], **{f"present.{name}": {0: "batch", 2: "total"} for name in names}}
    return Traced(program, tuple(taken), tuple(returned), {**taken, **returned}, layers, kv_heads, head_dim, **more)
