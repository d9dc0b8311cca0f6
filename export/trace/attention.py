"""What stands in for transformers' attention while a decoder runs: whatever the current run says.

transformers asks its registries of attentions and masks by name. Under our name they have two functions, which call
what the run that is under way has brought along: a survey, or the operator that is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from flora_fx.errors import require

from .refusals import Unsuited

__all__ = ["AttentionRun", "attending", "current_run", "replace_attention"]

_NAME = "flora_fx_decoder"


@dataclass
class AttentionRun:
    """One run of a model.

    Attributes:
        attend: (query, key, value [batch, heads, seq, dim], mask, options) -> [batch, seq, heads, dim].
        mask: what each layer gets as its mask; called as transformers' mask functions are.
        longest: how many tokens the longest row has, []; None where that does not matter.
        present: keys and values that the layers leave behind, in their order.
    """

    attend: Callable[..., Tensor]
    mask: Callable[..., Any]
    longest: Tensor | None = None
    present: list[Tensor] = field(default_factory=list)


_run: ContextVar[AttentionRun] = ContextVar("flora_fx_decoder_run")


def current_run() -> AttentionRun:
    """The run that is under way."""
    return _run.get()


@contextmanager
def attending(run: AttentionRun) -> Iterator[None]:
    """Whatever model runs meanwhile, if its attention was replaced, attends as ``run`` says."""
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


def replace_attention(model: Any) -> None:
    """Let a private model attend through the current run.

    Raises:
        Unsuited: its attention cannot be replaced.
    """
    transformers = require("transformers", "hf")
    if not getattr(model, "_supports_attention_backend", False):
        raise Unsuited("its attention is not behind transformers' AttentionInterface")
    transformers.AttentionInterface.register(_NAME, _attention)
    transformers.AttentionMaskInterface.register(_NAME, _mask)
    try:
        model.set_attn_implementation(_NAME)
    except ValueError as error:
        raise Unsuited(f"its attention could not be replaced ({error})") from error


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Under transformers' AttentionInterface: [batch, heads, seq, dim] -> [batch, seq, heads, dim]."""
    return current_run().attend(query, key, value, mask=attention_mask, **options), None


def _mask(**options: Any) -> Any:
    """Under transformers' AttentionMaskInterface."""
    return current_run().mask(**options)
