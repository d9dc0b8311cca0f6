"""A causal LM captured with ONNX Runtime's attention: one `group_query_attention` a layer, no mask, no repeated keys.

The model runs twice with an attention of our own. First eagerly, to see what each layer asks for: heads, scale, window,
soft cap, rotary angles. What GroupQueryAttention cannot do is refused then, with a reason. Then under `torch.export`,
where each layer's keys and values go through the operator instead of transformers' cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from flora_fx.decoder_ops import group_query_attention, positions, rotary_rows
from flora_fx.errors import require

from ..rewrite.rotary import absorb_rotary, count_rotary, reads_positions
from .capture import NotCaptured, Traced, capture, first_line, max_positions, text_config
from .model import private_copy
from .switches import Changing, find_switches, is_rotary, rows_of

__all__ = ["Unsuited", "trace_decoder"]

_NAME = "flora_fx_decoder"


class Unsuited(Exception):  # noqa: N818
    """The model computes something that GroupQueryAttention cannot; the general route is for it."""


@dataclass(frozen=True)
class _Causal:
    """Stands for the mask that a layer gets: each token sees so many, itself included (-1: all before it)."""

    window: int


@dataclass(frozen=True)
class _Layer:
    """What a layer's attention asks for."""

    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int
    softcap: float


@dataclass
class _Run:
    """One run of the model: how it attends, what stands for masks, its longest row, what the layers leave behind."""

    attend: Callable[..., Tensor]
    mask: Callable[..., Any]
    longest: Tensor | None = None
    layers: list[_Layer] = field(default_factory=list)
    present: list[Tensor] = field(default_factory=list)


_run: ContextVar[_Run] = ContextVar("flora_fx_decoder_run")


def trace_decoder(model: nn.Module, provider: str = "CPUExecutionProvider") -> Traced:
    """Capture a causal LM; it is left as it was.

    Args:
        model: a transformers model in eval mode.
        provider: the execution provider that it is for.

    Returns:
        Target ``"decoder"``, prefill and decode in one: input_ids [batch, seq], attention_mask [batch, total], past
        keys and values [batch, kv_heads, past, dim] -> logits [batch, seq, vocab], present keys and values.

    Raises:
        Unsuited: it cannot be computed by GroupQueryAttention.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise Unsuited("its forward takes no position_ids")
    twin: Any = private_copy(model)
    _attend_by_ours(twin)
    _tabulate_rotary(twin)
    wrapper = _Decoder(twin)
    layers = wrapper.survey()
    for layer in layers:
        if layer.dim % 16:
            raise Unsuited(f"its heads are {layer.dim} wide; ONNX Runtime's GroupQueryAttention wants multiples of 16")
    if len({(layer.kv_heads, layer.dim) for layer in layers}) != 1:
        raise Unsuited("its layers have keys and values of different shapes")
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    if provider == "CUDAExecutionProvider" and dtype == torch.float32:
        raise Unsuited("GroupQueryAttention has no float32 kernel on CUDA (dtype=torch.float16 has one)")
    # Sizes 0 and 1 are special to torch.export; sizes that differ keep the dimensions apart.
    batch, length, before = 2, 3, 5
    ids = torch.arange(batch * length, device=device).reshape(batch, length) % text_config(model).vocab_size
    mask = ids.new_ones(batch, before + length)
    past = tuple(
        torch.zeros(batch, layer.kv_heads, before, layer.dim, device=device, dtype=dtype)
        for layer in layers
        for _ in ("key", "value")
    )
    rows, seq, total, old = Dim("batch"), Dim("sequence"), Dim("total"), Dim("past")
    shapes = ({0: rows, 1: seq}, {0: rows, 1: total}, tuple({0: rows, 2: old} for _ in past))
    try:
        program = capture(wrapper, (ids, mask, past), shapes)
    except NotCaptured as refusal:
        raise Unsuited(f"torch.export cannot capture it so ({refusal})") from refusal
    if not reads_positions(program):
        raise Unsuited("it makes positions of its own")
    absorb_rotary(program)
    rotating = count_rotary(program)
    switches = {switch for module in twin.modules() if isinstance(module, _Tables) for switch in module.switches}
    names = [f"{i}.{which}" for i in range(len(layers)) for which in ("key", "value")]
    return Traced(
        program,
        ("input_ids", "attention_mask", *(f"past_key_values.{name}" for name in names)),
        ("logits", *(f"present.{name}" for name in names)),
        {
            "input_ids": {0: "batch", 1: "sequence"},
            "attention_mask": {0: "batch", 1: "total"},
            **{f"past_key_values.{name}": {0: "batch", 2: "past"} for name in names},
            "logits": {0: "batch", 1: "sequence"},
            **{f"present.{name}": {0: "batch", 2: "total"} for name in names},
        },
        len(layers),
        layers[0].kv_heads,
        layers[0].dim,
        target="decoder",
        notes=("rotary positions are computed outside of the attention",) if rotating else (),
        switches=tuple(sorted(switches)),
    )


class _Decoder(nn.Module):
    """Prefill and decode in one, keys and values by way of `group_query_attention`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.layers: list[_Layer] = []

    def survey(self) -> list[_Layer]:
        """Run once to see what each layer asks for.

        Raises:
            Unsuited: see `trace_decoder`.
        """
        run = _Run(_observed, _classified)
        device = next(self.parameters()).device
        ids = torch.arange(3, device=device)[None] % text_config(self.model).vocab_size
        try:
            with torch.no_grad(), _running(run):
                self.model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=ids * 0, use_cache=False)
        except Unsuited:
            raise
        except Exception as error:  # whatever a model does with masks and weights that are not there
            raise Unsuited(f"its attention could not be replaced ({first_line(error)})") from error
        expected = text_config(self.model).num_hidden_layers
        if len(run.layers) != expected:
            raise Unsuited(f"{len(run.layers)} of its {expected} layers attend through transformers' interface")
        self.layers = run.layers
        return run.layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seqlens = (attention_mask.sum(1) - 1).to(torch.int32)
        total = attention_mask.shape[1]

        def attend(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
            index = len(run.present) // 2
            layer = self.layers[index]
            flat = (x.transpose(1, 2).flatten(2) for x in (query, key, value))
            past_key, past_value = past[2 * index], past[2 * index + 1]
            numbers = (layer.heads, layer.kv_heads, layer.scale, layer.window, layer.softcap, False)
            out, *present = group_query_attention(*flat, past_key, past_value, seqlens, total, None, None, *numbers)
            run.present.extend(present)
            return out.unflatten(-1, (layer.heads, layer.dim))

        run = _Run(attend, lambda **_: None, seqlens.max() + 1)
        with _running(run):
            out = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions(seqlens, input_ids),
                use_cache=False,
            )
        return (out.logits, *run.present)


@contextmanager
def _running(run: _Run) -> Iterator[None]:
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


# --- attention --------------------------------------------------------------------------------------------


def _attend_by_ours(model: Any) -> None:
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
    return _run.get().attend(query, key, value, mask=attention_mask, **options), None


def _mask(**options: Any) -> Any:
    """Under transformers' AttentionMaskInterface."""
    return _run.get().mask(**options)


def _classified(*, mask_function: Callable[..., Any], **_: Any) -> _Causal:
    """What a mask lets a token see.

    Raises:
        Unsuited: it is neither causal nor causal with a window.
    """
    from transformers import masking_utils

    if mask_function is masking_utils.causal_mask_function:
        return _Causal(-1)
    for window in _closed_over(mask_function):
        reference = masking_utils.sliding_window_causal_mask_function(window)
        at = torch.cat([torch.arange(8), torch.arange(max(window - 3, 0), window + 5)])
        zero = torch.tensor(0)
        pairs = [(zero, zero, q, k) for q in at for k in at]
        if all(bool(mask_function(*pair)) == bool(reference(*pair)) for pair in pairs):
            return _Causal(window)
    raise Unsuited("its mask is neither causal nor a sliding window")


def _closed_over(function: Any) -> Iterator[int]:
    """Whole numbers in a function's closure, and in those of the functions in there: a window is one of them."""
    for cell in function.__closure__ or ():
        for found in cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,):
            if isinstance(found, int) and not isinstance(found, bool):
                yield found
            elif callable(found):
                yield from _closed_over(found)


_KNOWN = {"dropout", "scaling", "sliding_window", "softcap", "is_causal", "position_ids", "cache_position"}


def _observed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> Tensor:
    """Note what a layer asks for, and return zeros.

    Raises:
        Unsuited: GroupQueryAttention has no such thing.
    """
    if not isinstance(mask, _Causal):
        raise Unsuited("its attention adds a mask of its own to the scores")
    if unknown := [name for name, value in options.items() if name not in _KNOWN and isinstance(value, Tensor | float)]:
        raise Unsuited(f"its attention takes {', '.join(unknown)}")
    if is_causal is False or not query.shape[2] == key.shape[2] == value.shape[2]:
        raise Unsuited("its attention is not that of a sequence to itself")
    dim = query.shape[3]
    if not key.shape[3] == value.shape[3] == dim or key.shape[1] != value.shape[1]:
        raise Unsuited("its queries, keys and values are of different widths")
    scale = dim**-0.5 if scaling is None else float(scaling)
    _run.get().layers.append(_Layer(query.shape[1], key.shape[1], dim, scale, mask.window, float(softcap or 0.0)))
    return torch.zeros_like(query.transpose(1, 2))


# --- rotary positions -------------------------------------------------------------------------------------


def _tabulate_rotary(model: nn.Module) -> None:
    """Rotary embeddings become tables, whose rows GroupQueryAttention can look up itself.

    Raises:
        Unsuited: their angles depend on the length of the sequence.
    """
    length = max_positions(model)
    for name, module in list(model.named_modules()):
        if is_rotary(module):
            kinds = [value for key, value in vars(module).items() if key.endswith("rope_type")]
            kinds += [kind for value in kinds if isinstance(value, dict) for kind in value.values()]
            if "dynamic" in kinds:
                raise Unsuited("its rotary positions are dynamic: they depend on the length of the sequence")
            if length:
                model.set_submodule(name, _Tables(module, length))


class _Tables(nn.Module):
    """A rotary embedding as tables of cosines and sines, one pair for each way it is called.

    Where its rows change with the length of a text (LongRoPE), a table has one part for each way, one below the other;
    which part is looked up depends on the longest row of a batch, as in transformers.

    Attributes:
        switches: after how many tokens they change, however it is called.
    """

    def __init__(self, module: nn.Module, length: int) -> None:
        super().__init__()
        self.module = module
        self.length = length
        self.known: dict[str, _Table | None] = {}
        self.switches: set[int] = set()

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        key = repr((args, sorted(kwargs.items())))
        if key not in self.known:
            self.known[key] = self.tabulate(x, args, kwargs)
        table = self.known[key]
        if table is None:
            return self.module(x, position_ids, *args, **kwargs)
        longest = _run.get().longest
        if table.switches and longest is not None:
            position_ids = position_ids + sum(torch.where(longest > switch, switch, 0) for switch in table.switches)
        cos, sin = (self.get_buffer(f"{which}{table.name}") for which in ("cos", "sin"))
        return rotary_rows(cos, sin, position_ids, table.interleaved)

    def tabulate(self, x: Tensor, args: Any, kwargs: Any) -> _Table | None:
        """Make a pair of tables, if what it returns can be written so."""
        rotary = rows_of(self.module, x, *args, **kwargs)
        try:
            switches = find_switches(rows_of(self.module, x.float(), *args, **kwargs), self.length)
        except Changing as reason:
            raise Unsuited(str(reason)) from reason
        self.switches |= {*switches}
        parts = [rotary(torch.arange(length)[None]) for length in (*switches, self.length)]
        if not all(isinstance(rows, tuple) and len(rows) == 2 for rows in parts):
            return None
        if not all(table.dim() == 3 and table.shape[0] == 1 for rows in parts for table in rows):
            return None
        rows = [torch.cat(tables, 1)[0] for tables in zip(*parts, strict=True)]
        half = rows[0].shape[-1] // 2
        ways = [(slice(0, half), slice(half, None), False), (slice(0, None, 2), slice(1, None, 2), True)]
        for first, second, interleaved in ways:
            if all(torch.equal(table[:, first], table[:, second]) for table in rows):
                name = f"_{len(self.known)}"
                for which, table in zip(("cos", "sin"), rows, strict=True):
                    self.register_buffer(f"{which}{name}", table[:, first].contiguous(), persistent=False)
                return _Table(name, interleaved, switches)
        return None


@dataclass(frozen=True)
class _Table:
    """The name of a pair of tables, whether each number stands beside its twin, and where the parts begin anew."""

    name: str
    interleaved: bool
    switches: tuple[int, ...]
