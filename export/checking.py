"""Run an export on ONNX Runtime and compare it with the PyTorch model that it was made from."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.errors import ExportError, require

from .decoder import Decoder
from .encoder import Encoder
from .manifest import DATA, MODEL, Manifest
from .session import Session, usable_providers
from .widening import save_in_float32

__all__ = ["TOLERANCES", "Check", "check"]

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Allowed difference by dtype, over the largest magnitude that PyTorch computed: rounding adds up over the layers."""

_NEW_TOKENS = 16


@dataclass(frozen=True)
class Check:
    """What a check found; see `ExportResult`."""

    max_abs_error: float
    max_rel_error: float
    greedy_tokens_equal: bool | None
    checked_on: str


def check(directory: Path, manifest: Manifest, model: nn.Module, providers: Sequence[Any] | None) -> Check:
    """Compare a written graph with its model.

    Args:
        directory: holds the graph; its manifest need not be written yet.
        manifest: of the graph.
        model: the unfused transformers model in the export's dtype, in eval mode.
        providers: see `usable_providers`.

    Raises:
        ExportError: they do not agree.
    """
    usable = usable_providers(providers)
    if manifest.dtype == "bfloat16" and usable == ["CPUExecutionProvider"]:
        # There are no bfloat16 kernels on the CPU (ONNX Runtime 1.31): the same graph is checked in float32.
        with tempfile.TemporaryDirectory(prefix="flora_fx-check-") as wide:
            save_in_float32(directory / MODEL, Path(wide) / MODEL, data=DATA)
            found = _check(Session(Path(wide) / MODEL, providers=usable), manifest, model)
        return replace(found, checked_on=f"{found.checked_on}, in float32")
    return _check(Session(directory / MODEL, providers=usable), manifest, model)


@torch.no_grad()
def _check(session: Session, manifest: Manifest, model: nn.Module) -> Check:
    if manifest.kind == "encoder":
        return _check_encoder(Encoder(session, manifest), model)
    return _check_decoder(Decoder(session, manifest), model)


# --- causal language models -------------------------------------------------------------------------------


def _check_decoder(decoder: Decoder, model: nn.Module) -> Check:
    transformers = require("transformers", "hf")
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, decoder.manifest.vocab_size, (2, 7), generator=random)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # the second prompt is shorter

    logits, past = decoder.step(ids, mask)
    expected, cache = _run(model, ids, mask, transformers.DynamicCache())
    differences = Differences(decoder.manifest.dtype)
    differences.add("the logits of a prompt", logits[mask.bool()], expected[mask.bool()])

    token = expected[:, -1].argmax(-1, keepdim=True)
    mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    logits, _ = decoder.step(token, mask, past)
    expected, _ = _run(model, token, mask, cache)
    differences.add("the logits of the next token", logits, expected)
    equal = _same_tokens(decoder, model, ids, mask[:, :-1], differences)
    return Check(differences.max_abs, differences.max_rel, equal, decoder.session.provider)


def _run(model: nn.Module, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
    device = next(model.parameters()).device
    extra = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        extra["position_ids"] = positions[:, -ids.shape[1] :].to(device)
    out = model(
        input_ids=ids.to(device), attention_mask=mask.to(device), past_key_values=cache, use_cache=True, **extra
    )
    return out.logits.cpu(), out.past_key_values


@contextmanager
def _endless(model: nn.Module) -> Iterator[None]:
    """No token ends a generation: transformers takes what a given configuration leaves open from the model's own."""
    own: Any = model.generation_config
    ends, own.eos_token_id = own.eos_token_id, None
    try:
        yield
    finally:
        own.eos_token_id = ends


def _same_tokens(decoder: Decoder, model: nn.Module, ids: Tensor, mask: Tensor, differences: Differences) -> bool:
    """Greedy generation by both. Where PyTorch's two candidates are nearer than the tolerance, either may win."""
    transformers = require("transformers", "hf")
    device = next(model.parameters()).device
    limit = decoder.manifest.max_positions
    count = min(_NEW_TOKENS, limit - ids.shape[1]) if limit else _NEW_TOKENS
    if count < 1:
        return True
    plain = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=count, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    with _endless(model):
        out = model.generate(  # type: ignore[operator]
            ids.to(device), attention_mask=mask.to(device), generation_config=plain
        )
    expected = out.sequences.cpu()
    found = decoder.generate(ids, mask, max_new_tokens=count, eos_token_id=[])
    differ = expected != found
    for row in differ.any(1).nonzero().flatten().tolist():
        index = int(differ[row].nonzero()[0])
        logits = out.logits[index - ids.shape[1]][row].float().cpu()
        gap = float(logits[expected[row, index]] - logits[found[row, index]])
        if gap > 2 * differences.tolerance * float(logits.abs().max()):
            raise ExportError(
                f"the export generates other tokens than PyTorch: token {index - ids.shape[1]} of row {row} is "
                f"{int(found[row, index])} instead of {int(expected[row, index])}, whose logit is larger by {gap:.2g}"
            )
    return not bool(differ.any())


# --- encoders ---------------------------------------------------------------------------------------------


def _check_encoder(encoder: Encoder, model: nn.Module) -> Check:
    random = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    vocab = encoder.manifest.vocab_size
    sizes = {"batch": 3, "sequence": 9}
    inputs = {}
    for name, (shape, dtype) in encoder.session.inputs.items():
        wanted = [size if isinstance(size, int) else sizes.get(size, 3) for size in shape]
        if name == "attention_mask":
            value = torch.ones(wanted, dtype=dtype)
            value[1, -4:] = 0
        elif dtype.is_floating_point:
            value = torch.randn(wanted, generator=random).to(dtype)
        else:
            value = torch.randint(0, vocab if name == "input_ids" else 2, wanted, generator=random).to(dtype)
        inputs[name] = value
    parameters = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in parameters else {}
    weights = next(model.parameters()).dtype
    expected = model(
        **{name: v.to(device, weights if v.is_floating_point() else v.dtype) for name, v in inputs.items()}, **extra
    )
    found = encoder(**inputs)
    differences = Differences(encoder.manifest.dtype)
    mask = inputs.get("attention_mask")
    for name, value in found.items():
        wanted_value = expected[name].cpu()
        if mask is not None and value.dim() > 2 and value.shape[:2] == mask.shape:
            value, wanted_value = value[mask.bool()], wanted_value[mask.bool()]
        differences.add(name, value, wanted_value)
    return Check(differences.max_abs, differences.max_rel, None, encoder.session.provider)


# --- both -------------------------------------------------------------------------------------------------


class Differences:
    """The largest differences seen, refused above a dtype's tolerance.

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
