"""A batch whose rows have adapters of their own, under ONNX Runtime.

base                     nobody has an adapter
one adapter              all rows have the same one
stacked                  all adapters stand in one graph, as constants
stacked (slots)          the same, and each can be replaced
a session per adapter    each runs the rows of its adapter, one session after the other
…, custom ops            in the operators of ``flora_ort``, where they are built
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.errors import ExportError
from flora_fx.export import Decoder, export_onnx, load_decoder
from flora_fx.export.directory.operators import operators_library
from flora_fx.measuring.sessions import session_options

from ..contenders.contender import Contender
from ..contenders.onnx_exports import PROVIDERS
from ..contenders.settings import Settings

__all__ = ["NAMES", "OF_ONE", "SESSIONS", "onnx_contenders", "writable", "write_exports"]

BASE, ONE, STACKED, SLOTS, SESSIONS = _PLAIN = (
    "base",
    "one adapter",
    "stacked",
    "stacked (slots)",
    "a session per adapter",
)
_ONE_OPS, _STACKED_OPS, _SLOTS_OPS = _OPS = (
    "one adapter (custom ops)",
    "stacked (custom ops)",
    "stacked (slots, custom ops)",
)
NAMES = (*_PLAIN, *_OPS)
"""Of the contenders."""

OF_ONE = (ONE, _ONE_OPS)
"""Whose rows all have the first adapter."""

_SWAPPED = (SLOTS, SESSIONS, _SLOTS_OPS)
_WITH_ALL = (STACKED, SLOTS, _STACKED_OPS, _SLOTS_OPS)


def writable(device: str) -> tuple[str, ...]:
    """Those that can be written here; nobody needs a compiler for the others.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
    """
    try:
        operators_library(PROVIDERS[device])
    except ExportError:
        return _PLAIN
    return NAMES


def write_exports(
    settings: Settings, base: nn.Module, model: Any, adapters: Sequence[str], place: Path, wanted: Sequence[str]
) -> None:
    """Export a model, a folder for each form.

    Args:
        settings: for the device.
        base: the model without adapters.
        model: of PEFT, with all of them.
        adapters: their names; the first has the highest rank, and is on all layers that any of them is on.
        place: gets the folders.
        wanted: which of `NAMES`.
    """
    providers = [*dict.fromkeys((PROVIDERS[settings.device], PROVIDERS["cpu"]))]
    model.set_adapter(adapters[0])
    for name in wanted:
        several = {"adapters": adapters} if name in _WITH_ALL else {}
        swapped = {"hot_swap": True} if name in _SWAPPED else {}
        options: dict[str, Any] = {**several, **swapped, "custom_ops": name in _OPS}
        export_onnx(base if name == BASE else model, place / name, providers=providers, **options)


def onnx_contenders(
    settings: Settings, model: Any, rows: Sequence[str], place: Path, room: int, names: Sequence[str]
) -> Mapping[str, Contender]:
    """What runs the exports.

    Args:
        settings: threads and device.
        model: that they were made from; its active adapter is another one afterwards.
        rows: the adapter of each row of the batch.
        place: of `write_exports`.
        room: tokens after the prompt.
        names: of those that are wanted: each holds the weights once more, and a session per adapter that many times.
    """
    found: dict[str, Contender] = {}
    for name in names:
        if name == SESSIONS:
            found[name] = _Sessions(settings, model, rows, place / name, room)
        else:
            decoder = _opened(settings, place / name)
            found[name] = _Rows(decoder, rows if name in _WITH_ALL else None, room)
    return found


def _opened(settings: Settings, directory: Path) -> Decoder:
    return load_decoder(
        directory,
        providers=[PROVIDERS[settings.device]],
        session_options=session_options(settings.threads),
        verify=False,
        cuda_graph=settings.device == "cuda",
    )


class _Rows:
    """One session for all rows; see `Contender`."""

    compiled = False
    note = ""

    def __init__(self, decoder: Decoder, rows: Sequence[str] | None, room: int) -> None:
        self._cache = decoder.new_cache(adapters=rows)
        self._room = room

    def prefill(self, prompt: Tensor) -> Tensor:
        """Start a new sequence: tokens [batch, prompt] -> logits [batch, vocabulary]."""
        ids = prompt.cpu()
        self._cache.begin(len(ids))
        return self._cache.prefill(ids, torch.ones_like(ids), self._room).tensor

    def decode(self, token: Tensor) -> Tensor:
        """Go on by one token: [batch, 1] -> logits [batch, vocabulary]."""
        return self._cache.decode(token[:, 0].tolist()).tensor


class _Sessions:
    """One for each adapter, which runs the rows that have it; see `Contender`."""

    compiled = False
    note = ""

    def __init__(self, settings: Settings, model: Any, rows: Sequence[str], directory: Path, room: int) -> None:
        self._parts: list[tuple[Tensor, _Rows]] = []
        for name in dict.fromkeys(rows):
            decoder = _opened(settings, directory)
            model.set_adapter(name)
            decoder.load_adapter(model)
            mine = torch.tensor([row for row, wanted in enumerate(rows) if wanted == name])
            self._parts.append((mine, _Rows(decoder, None, room)))

    def prefill(self, prompt: Tensor) -> Tensor:
        """Start a new sequence: tokens [batch, prompt] -> logits [batch, vocabulary]."""
        return self._gathered([(mine, part.prefill(prompt[mine])) for mine, part in self._parts])

    def decode(self, token: Tensor) -> Tensor:
        """Go on by one token: [batch, 1] -> logits [batch, vocabulary]."""
        return self._gathered([(mine, part.decode(token[mine])) for mine, part in self._parts])

    def _gathered(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        order = torch.cat([mine for mine, _ in parts]).argsort()
        return torch.cat([logits for _, logits in parts])[order]
