"""Run an export on ONNX Runtime and compare it with the PyTorch model that it was made from."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.errors import require

from ..directory.manifest import ENCODER, MODEL, Manifest
from ..run.cuda_graph import open_decoder
from ..run.decoder import Decoder
from ..run.encoder import Encoder
from ..run.seq2seq import Seq2Seq
from ..run.session import Session, usable_providers
from .crossing import check_crossings
from .differences import TOLERANCES, Check, Differences, own_config, same_tokens
from .seq2seq import check_seq2seq
from .slots import adapted, check_slots
from .upcast import save_in_float32

__all__ = ["TOLERANCES", "Check", "check"]

_NEW_TOKENS = 16


def check(
    directory: Path,
    manifest: Manifest,
    model: nn.Module,
    providers: Sequence[Any] | None,
    example: Mapping[str, Tensor] | None = None,
) -> Check:
    """Compare a written graph with its model.

    Args:
        directory: holds the graph; its manifest need not be written yet.
        manifest: of the graph.
        model: the unfused transformers model in the export's dtype, in eval mode.
        providers: see `usable_providers`.
        example: inputs to compare an encoder on, see `Traced`.

    Raises:
        ExportError: they do not agree.
    """
    usable = usable_providers(providers)
    if manifest.dtype == "bfloat16" and usable == ["CPUExecutionProvider"]:
        # There are no bfloat16 kernels on the CPU (ONNX Runtime 1.31): the same graph is checked in float32.
        with tempfile.TemporaryDirectory(prefix="flora_fx-check-") as wide:
            for name in manifest.graphs:
                save_in_float32(directory / name, Path(wide) / name, data=f"{name}.data")
            found = _check(Path(wide), manifest, model, usable, example or {})
        return replace(found, checked_on=f"{found.checked_on}, in float32")
    return _check(directory, manifest, model, usable, example or {})


@torch.no_grad()
def _check(
    directory: Path, manifest: Manifest, model: nn.Module, providers: Sequence[Any], example: Mapping[str, Tensor]
) -> Check:
    if manifest.kind == "causal-lm":
        decoder, _ = open_decoder(directory / MODEL, manifest, providers=providers)
        if not manifest.slots:
            return _check_decoder(decoder, model)
        with adapted(model, None):
            found = _check_decoder(decoder, model)
        return _check_rows(decoder, model, found)
    session = Session(directory / MODEL, providers=providers)
    if manifest.kind == "seq2seq-lm":
        runner = Seq2Seq(Session(directory / ENCODER, providers=providers), session, manifest)
        return check_seq2seq(runner, model, example)
    return _check_encoder(Encoder(session, manifest), model, example)


# --- causal language models -------------------------------------------------------------------------------


def _check_decoder(decoder: Decoder, model: nn.Module) -> Check:
    transformers = require("transformers", "hf")
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, decoder.manifest.vocab_size, (2, 7), generator=random)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # the second prompt is shorter

    logits = decoder(ids, mask)
    expected, cache = _run(model, ids, mask, transformers.DynamicCache())
    differences = Differences(_precision(decoder.manifest))
    differences.add("the logits of a prompt", logits[mask.bool()], expected[mask.bool()])

    token = expected[:, -1].argmax(-1, keepdim=True)
    mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    past = decoder.new_cache()
    past.prefill(ids, mask[:, :-1], room=1)
    logits = past.decode(token[:, 0].tolist()).cpu()
    expected, _ = _run(model, token, mask, cache)
    differences.add("the logits of the next token", logits, expected[:, -1])
    # Before longer texts, which PyTorch's dynamic NTK scaling would remember.
    crossed, not_crossed = check_crossings(decoder, model, partial(_run, model), differences)
    equal = _same_tokens(decoder, model, ids, mask[:, :-1], differences)
    session = decoder.session
    checked_on = f"{session.provider}, in a CUDA graph" if session.cuda_graph else session.provider
    return Check(differences.max_abs, differences.max_rel, equal, checked_on, crossed, not_crossed)


def _precision(manifest: Manifest) -> str:
    """What the check's tolerance goes by."""
    return "int8" if manifest.base.get("activations") == "int8" else manifest.dtype


def _check_rows(decoder: Decoder, model: nn.Module, found: Check) -> Check:
    """Where each row chooses its adapter, beside what was found without any."""
    differences = Differences(_precision(decoder.manifest))
    check_slots(decoder, model, partial(_run, model), differences)
    return replace(
        found,
        max_abs_error=max(found.max_abs_error, differences.max_abs),
        max_rel_error=max(found.max_rel_error, differences.max_rel),
    )


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


def _same_tokens(decoder: Decoder, model: nn.Module, ids: Tensor, mask: Tensor, differences: Differences) -> bool:
    """Greedy generation by both, without a token that ends it."""
    transformers = require("transformers", "hf")
    device = next(model.parameters()).device
    limit = decoder.manifest.max_positions
    count = min(_NEW_TOKENS, limit - ids.shape[1]) if limit else _NEW_TOKENS
    if count < 1:
        return True
    plain = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=count, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    with own_config(model, plain):
        out = model.generate(  # type: ignore[operator]
            ids.to(device), attention_mask=mask.to(device), generation_config=plain
        )
    expected = out.sequences.cpu()
    found = decoder.generate(ids, mask, max_new_tokens=count, eos_token_id=[])
    return same_tokens(found, expected, out.logits, ids.shape[1], differences)


# --- encoders ---------------------------------------------------------------------------------------------


def _check_encoder(encoder: Encoder, model: nn.Module, inputs: Mapping[str, Tensor]) -> Check:
    device = next(model.parameters()).device
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
