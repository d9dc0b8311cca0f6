"""`load`, `load_decoder`: an exported directory, ready to run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flora_fx.errors import ExportError

from ..directory.manifest import ENCODER, MODEL, Manifest, read_manifest
from .cuda_graph import open_decoder
from .decoder import Decoder
from .encoder import Encoder
from .seq2seq import Seq2Seq
from .session import Session, usable_providers

__all__ = ["load", "load_decoder"]


def load(
    directory: str | Path,
    *,
    providers: Sequence[Any] | None = None,
    session_options: Any = None,
    verify: bool = True,
    cuda_graph: bool | None = None,
    tune_gemms: bool = False,
) -> Decoder | Seq2Seq | Encoder:
    """Open what `export_onnx` wrote.

    Args:
        directory: the exported one.
        providers: ONNX Runtime execution providers, as for ``onnxruntime.InferenceSession``; None for CUDA where it
            can be used, and the CPU.
        session_options: ``onnxruntime.SessionOptions``, for instance with a number of threads.
        verify: compare the SHA-256 of every file; sizes are compared in any case.
        cuda_graph: capture the decode step as a CUDA graph and replay it. None: where the target is ``"decoder"`` and
            the provider CUDA; if the graph cannot be captured, a RuntimeWarning says why, and the step runs without.
            True: or else an error. False: no.
        tune_gemms: on CUDA, let ONNX Runtime try its own kernels for GEMMs of few rows beside cuBLAS's, and take the
            faster one (``ep.cuda.enable_gemm_auto_tune``). The first prompt of each length takes longer.

    Returns:
        A `Decoder` for a causal LM, a `Seq2Seq` for an encoder-decoder, an `Encoder` for an encoder.

    Raises:
        ExportError: the directory is missing, half written or changed, or ONNX Runtime cannot load it
            here (bfloat16 needs a GPU; operators of ``flora_ort`` need that library), or ``cuda_graph=True`` where
            there can be none, or ``tune_gemms`` without CUDA.
        MissingExtraError: onnx or onnxruntime is not installed.

    >>> load("no-such-directory")
    Traceback (most recent call last):
    ...
    flora_fx.errors.ExportError: no directory no-such-directory; check the path, or write one with export_onnx
    """
    place = Path(directory)
    return _opened(place, read_manifest(place, verify=verify), providers, session_options, cuda_graph, tune_gemms)


def load_decoder(
    directory: str | Path,
    *,
    providers: Sequence[Any] | None = None,
    session_options: Any = None,
    verify: bool = True,
    cuda_graph: bool | None = None,
    tune_gemms: bool = False,
) -> Decoder:
    """Open what `export_onnx` wrote of a causal LM: as `load`, for code that is type-checked.

    Args:
        directory, providers, session_options, verify, cuda_graph, tune_gemms: as for `load`.

    Raises:
        ExportError: as `load`; or the export is of another kind.
        MissingExtraError: onnx or onnxruntime is not installed.

    >>> decoder = load_decoder("exported")  # doctest: +SKIP
    >>> decoder.load_adapter("another-lora")  # doctest: +SKIP
    """
    place = Path(directory)
    manifest = read_manifest(place, verify=verify)
    if manifest.kind != "causal-lm":
        raise ExportError(f"{place} is of kind {manifest.kind!r}, and no causal LM; open it with load")
    decoder = _opened(place, manifest, providers, session_options, cuda_graph, tune_gemms)
    assert isinstance(decoder, Decoder)
    return decoder


def _opened(
    place: Path,
    manifest: Manifest,
    providers: Sequence[Any] | None,
    session_options: Any,
    cuda_graph: bool | None,
    tune_gemms: bool,
) -> Decoder | Seq2Seq | Encoder:
    if manifest.dtype == "bfloat16" and usable_providers(providers) == ["CPUExecutionProvider"]:
        raise ExportError(
            f"{place} is in bfloat16, which ONNX Runtime does not compute on a CPU; use a GPU, or export the model "
            "again with dtype=torch.float32"
        )
    if manifest.kind == "causal-lm":
        decoder, without = open_decoder(
            place / MODEL,
            manifest,
            providers=providers,
            session_options=session_options,
            cuda_graph=cuda_graph,
            tune_gemms=tune_gemms,
        )
        if without:
            warnings.warn(
                f"{place} is decoded without a CUDA graph, which cuda_graph=False asks for: {without}",
                RuntimeWarning,
                stacklevel=3,
            )
        return decoder
    if cuda_graph:
        raise ExportError(
            f"cuda_graph is for causal LMs whose target is 'decoder'; {place} is of kind {manifest.kind!r}"
        )
    session = Session(place / MODEL, providers=providers, session_options=session_options, tune_gemms=tune_gemms)
    if manifest.kind == "seq2seq-lm":
        return Seq2Seq(
            Session(place / ENCODER, providers=providers, session_options=session_options, tune_gemms=tune_gemms),
            session,
            manifest,
        )
    return Encoder(session, manifest)
