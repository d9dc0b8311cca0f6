"""What a capture gives, and how `torch.export` is asked for one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from flora_fx.errors import require
from flora_fx.internals import exporter

__all__ = ["PREFIX", "NotCaptured", "Target", "Traced", "capture", "first_line", "max_positions", "text_config"]

PREFIX = "model."
"""Where wrappers hold the model that they are around; cut off the names of the weights again."""


Target = Literal["general", "decoder"]


class NotCaptured(Exception):  # noqa: N818
    """torch.export refuses a program; in one line, why."""


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
    target: Target = "general"
    notes: tuple[str, ...] = ()
    example: Mapping[str, Tensor] = field(default_factory=dict)
    needs_mask: bool = False
    endless: bool = False
    switches: tuple[int, ...] = ()


def text_config(model: nn.Module) -> Any:
    """The config of a model's text part: its own, if it has no other parts."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def max_positions(model: nn.Module) -> int:
    """The most tokens that a model has positions for; 0 where there is no end."""
    text = text_config(model)
    # Whisper's decoder has its own.
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None) or 0


def capture(wrapper: nn.Module, args: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    """`torch.export.export` with transformers' help.

    Args:
        wrapper: holds the model as ``model``, see `PREFIX`.
        args: example inputs.
        shapes: the dynamic dimensions, as ``torch.export`` takes them.

    Raises:
        NotCaptured: torch.export fails. That the wrapper runs on ``args`` is the caller's to know, see `run_on`.
    """
    with torch.no_grad(), _exportable(), _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between torch and transformers, nothing for users
        try:
            # Deferred: guards such as "length · min(12, 24 · length) is 12 · length" (from strides) are true, but not
            # provable. A false one would be found by the check of the export, which runs other sizes.
            return torch.export.export(
                wrapper,
                args,
                strict=False,
                dynamic_shapes=shapes,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        except Exception as error:  # of many kinds
            raise NotCaptured(first_line(error)) from error


def first_line(error: Exception) -> str:
    """What an error says, without the story that follows.

    >>> first_line(RuntimeError("no\\nbecause")), first_line(KeyError())
    ('no', 'KeyError')
    """
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Before it raises, torch.export logs what went wrong, and prints the graph that it has so far (torch 2.13).

    A logger that was asked for details (``TORCH_LOGS``) gives them.
    """
    named = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.partition(".")[0] == "torch"]
    levels = {logger: logger.level for logger in named if logger.getEffectiveLevel() >= logging.WARNING}
    own = vars(exporter())
    own["print"] = lambda *_, **__: None  # of that module alone
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        own.pop("print", None)


@contextmanager
def _exportable() -> Iterator[None]:
    """transformers' own replacements for what cannot be exported, for the time of a trace.

    Read in transformers 5.23: `transformers.exporters` registers them as it is imported.
    """
    require("transformers.exporters.exporter_onnx", "hf")
    patches = require("transformers.exporters.utils", "hf")
    with patches.apply_patches("onnx"), patches.apply_patches("dynamo"):
        yield
