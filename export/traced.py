"""What a capture gives, and how `torch.export` is asked for one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from flora_fx.errors import require

__all__ = ["PREFIX", "Target", "Traced", "capture", "text_config"]

PREFIX = "model."
"""Where wrappers hold the model that they are around; cut off the names of the weights again."""


Target = Literal["general", "decoder"]


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
        target: how it attends, see `export_onnx`.
        notes: what a reader of the export should know.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]]
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    encoder: Traced | None = None
    target: Target = "general"
    notes: tuple[str, ...] = ()


def text_config(model: nn.Module) -> Any:
    """The config of a model's text part: its own, if it has no other parts."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def capture(wrapper: nn.Module, args: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    """`torch.export.export` with transformers' help.

    Args:
        wrapper: holds the model as ``model``, see `PREFIX`.
        args: example inputs.
        shapes: the dynamic dimensions, as ``torch.export`` takes them.
    """
    with torch.no_grad(), _exportable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between torch and transformers, nothing for users
        # Deferred: guards such as "length · min(12, 24 · length) is 12 · length" (from strides) are true, but not
        # provable. A false one would be found by the check of the export, which runs other sizes.
        return torch.export.export(
            wrapper,
            args,
            strict=False,
            dynamic_shapes=shapes,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


@contextmanager
def _exportable() -> Iterator[None]:
    """transformers' own replacements for what cannot be exported, for the time of a trace.

    Read in transformers 5.23: `transformers.exporters` registers them as it is imported.
    """
    require("transformers.exporters.exporter_onnx", "hf")
    patches = require("transformers.exporters.utils", "hf")
    with patches.apply_patches("onnx"), patches.apply_patches("dynamo"):
        yield
