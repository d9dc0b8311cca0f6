"""`load`: an exported directory, ready to run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flora_fx.errors import ExportError

from .decoder import Decoder
from .encoder import Encoder
from .manifest import MODEL, read_manifest
from .session import Session, usable_providers

__all__ = ["load"]


def load(
    directory: str | Path,
    *,
    providers: Sequence[Any] | None = None,
    session_options: Any = None,
    verify: bool = True,
) -> Decoder | Encoder:
    """Open what `export_onnx` wrote.

    Args:
        directory: the exported one.
        providers: ONNX Runtime execution providers, as for ``onnxruntime.InferenceSession``; None for CUDA where it
            can be used, and the CPU.
        session_options: ``onnxruntime.SessionOptions``, for instance with a number of threads.
        verify: compare the SHA-256 of every file; sizes are compared in any case.

    Returns:
        A `Decoder` for a causal LM, an `Encoder` for an encoder.

    Raises:
        ExportError: the directory is missing, half written or changed, or ONNX Runtime cannot load it
            here (bfloat16 needs a GPU).
        MissingExtraError: onnx or onnxruntime is not installed.

    >>> load("no-such-directory")
    Traceback (most recent call last):
    ...
    flora_fx.errors.ExportError: no directory no-such-directory; check the path, or write one with export_onnx
    """
    place = Path(directory)
    manifest = read_manifest(place, verify=verify)
    if manifest.dtype == "bfloat16" and usable_providers(providers) == ["CPUExecutionProvider"]:
        raise ExportError(
            f"{place} is in bfloat16, which ONNX Runtime does not compute on a CPU; use a GPU, or export the model "
            "again with dtype=torch.float32"
        )
    session = Session(place / MODEL, providers=providers, session_options=session_options)
    return Decoder(session, manifest) if manifest.kind == "causal-lm" else Encoder(session, manifest)
