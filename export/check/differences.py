"""How far an export is from PyTorch, and how far it may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from flora_fx.errors import ExportError

__all__ = ["TOLERANCES", "Check", "Differences", "Verify", "own_config", "same_tokens"]

Verify = Literal["full", "quick", "none"]
"""How an export is compared with its model; see `export_onnx`."""

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "int8": 2e-1}
"""Allowed difference by dtype, over the largest magnitude that PyTorch computed: rounding adds up over the layers.

``int8``: of activations, see `export_onnx`.
"""


@dataclass(frozen=True)
class Check:
    """What a check found; see `ExportResult`."""

    max_abs_error: float
    max_rel_error: float
    greedy_tokens_equal: bool | None
    checked_on: str
    crossed: tuple[int, ...] = ()
    not_crossed: tuple[int, ...] = ()
    verified: Verify = "full"


class Differences:
    """The largest differences seen, refused above a dtype's tolerance.

    >>> import torch
    >>> differences = Differences("float32")
    >>> differences.add("x", torch.tensor([1.0]), torch.tensor([1.5]))
    Traceback (most recent call last):
    ...
    flora_fx.errors.ExportError: the export does not agree with PyTorch: x differs by 0.5 ...
    """

    def __init__(self, dtype: str) -> None:
        self.tolerance = TOLERANCES[dtype]
        self.max_abs = self.max_rel = 0.0

    def add(self, what: str, found: Tensor, expected: Tensor) -> None:
        """Compare two tensors.

        Raises:
            ExportError: they differ by more than the tolerance, in shape, or by a NaN.
        """
        if found.shape != expected.shape:
            raise ExportError(f"the export returns {what} in shape {list(found.shape)}, not {list(expected.shape)}")
        if not expected.numel():
            return
        difference = float((found.double() - expected.double()).abs().max())
        scale = float(expected.double().abs().max())
        relative = difference / scale if scale else difference
        if not relative <= self.tolerance:  # also NaN
            raise ExportError(
                f"the export does not agree with PyTorch: {what} differs by {difference:.2g} where the largest value "
                f"is {scale:.2g} (allowed: {self.tolerance:.0e} of it). Nothing was written; please report it with "
                "the model's config"
            )
        self.max_abs, self.max_rel = max(self.max_abs, difference), max(self.max_rel, relative)


def same_tokens(
    found: Tensor, expected: Tensor, logits: Sequence[Tensor], prompt: int, differences: Differences
) -> bool:
    """Whether two greedy generations are equal. Where the two candidates are nearer than the tolerance, either may win.

    Args:
        found, expected: [batch, prompt + new].
        logits: PyTorch's of each new token, [batch, vocab].
        prompt: how many tokens it started from.
        differences: with the tolerance.

    Raises:
        ExportError: they differ elsewhere than at a near tie.
    """
    differ = expected != found
    for row in differ.any(1).nonzero().flatten().tolist():
        index = int(differ[row].nonzero()[0])
        scores = logits[index - prompt][row].float().cpu()
        gap = float(scores[expected[row, index]] - scores[found[row, index]])
        if gap > 2 * differences.tolerance * float(scores.abs().max()):
            raise ExportError(
                f"the export generates other tokens than PyTorch: token {index - prompt} of row {row} is "
                f"{int(found[row, index])} instead of {int(expected[row, index])}, whose logit is larger by {gap:.2g}"
            )
    return not bool(differ.any())


@contextmanager
def own_config(model: nn.Module, config: Any) -> Iterator[None]:
    """Let a generation config hold alone: what it leaves open transformers takes from the model's own config."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own
