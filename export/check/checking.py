"""Run an export on ONNX Runtime and compare it with the PyTorch model that it was made from."""

from __future__ import annotations

import inspect
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.storage.casting import read_all

from ..directory.manifest import DATA, ENCODER, MODEL, Manifest
from ..run.cuda_graph import open_decoder
from ..run.decoder import Decoder
from ..run.encoder import Encoder
from ..run.seq2seq import Seq2Seq
from ..run.session import Session, usable_providers
from .decoder import check_decoder, precision, run_model
from .differences import TOLERANCES, Check, Differences, Verify
from .quick import check_quickly
from .seq2seq import check_seq2seq
from .slots import adapted, check_slots
from .upcast import save_in_float32

__all__ = ["TOLERANCES", "Check", "check"]

_LARGE = 2 * 2**30
"""Bytes of weights; of more, if nothing is asked for, the check of a causal LM on a CPU is a quick one."""


def check(
    directory: Path,
    manifest: Manifest,
    model: nn.Module,
    providers: Sequence[Any] | None,
    example: Mapping[str, Tensor] | None = None,
    verify: Verify | None = None,
) -> Check:
    """Compare a written graph with its model.

    Args:
        directory: holds the graph; its manifest need not be written yet.
        manifest: of the graph.
        model: the unfused transformers model in the export's dtype, in eval mode.
        providers: see `usable_providers`.
        example: inputs to compare an encoder on, see `Traced`.
        verify: see `export_onnx`.

    Raises:
        ExportError: they do not agree.
    """
    if verify == "none":
        return Check(math.nan, math.nan, None, "", verified="none")
    usable = usable_providers(providers)
    on_cpu = usable == ["CPUExecutionProvider"]
    size = sum(path.stat().st_size for path in directory.glob(f"{DATA}*"))
    if (
        manifest.kind == "causal-lm"
        and not manifest.slots
        and on_cpu
        and (verify == "quick" or (verify is None and size > _LARGE))
    ):
        narrow = manifest.dtype == "bfloat16"
        with torch.no_grad():
            found = check_quickly(directory / MODEL, manifest, model, usable, wide=narrow)
        return replace(found, checked_on=f"{found.checked_on}, in float32") if narrow else found
    if manifest.dtype == "bfloat16" and on_cpu:
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

        def opened() -> Decoder:
            return open_decoder(directory / MODEL, manifest, providers=providers)[0]

        if not manifest.slots:
            return check_decoder(opened, model)
        with adapted(model, None):
            found = check_decoder(opened, model)
        return _check_rows(opened(), model, found)
    read_all(model)
    session = Session(directory / MODEL, providers=providers)
    if manifest.kind == "seq2seq-lm":
        runner = Seq2Seq(Session(directory / ENCODER, providers=providers), session, manifest)
        return check_seq2seq(runner, model, example)
    return _check_encoder(Encoder(session, manifest), model, example)


def _check_rows(decoder: Decoder, model: nn.Module, found: Check) -> Check:
    """Where each row chooses its adapter, beside what was found without any."""
    differences = Differences(precision(decoder.manifest))
    check_slots(decoder, model, partial(run_model, model), differences)
    return replace(
        found,
        max_abs_error=max(found.max_abs_error, differences.max_abs),
        max_rel_error=max(found.max_rel_error, differences.max_rel),
    )


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
