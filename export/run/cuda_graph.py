"""A decoder, its step in a CUDA graph where that can be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flora_fx.errors import ExportError

from ..directory.manifest import Manifest
from .decoder import Decoder
from .session import Session, provider_name, usable_providers

__all__ = ["open_decoder"]


def open_decoder(
    path: Path,
    manifest: Manifest,
    *,
    providers: Sequence[Any] | None,
    session_options: Any = None,
    cuda_graph: bool | None = None,
    tune_gemms: bool = False,
) -> tuple[Decoder, str]:
    """Open the graph of a causal LM; a step is captured at once, so that what a CUDA graph forbids shows now.

    Args:
        path: of the ``.onnx`` file.
        manifest: of the graph.
        providers, session_options: see `Session`.
        cuda_graph: None for one where keys and values stay in their place and the provider is CUDA.
        tune_gemms: see `Session`; what a step needs is tried before it is captured.

    Returns:
        a decoder, and why it has no CUDA graph where it should have one; empty otherwise.

    Raises:
        ExportError: ONNX Runtime cannot load the graph; or there can be no CUDA graph, and ``cuda_graph`` is True.
    """

    def opened(*, captured: bool) -> Decoder:
        session = Session(
            path,
            providers=providers,
            session_options=session_options,
            cuda_graph=captured,
            tune_gemms=tune_gemms,
        )
        return Decoder(session, manifest)

    on_cuda = provider_name(usable_providers(providers)[0]) == "CUDAExecutionProvider"
    if not (on_cuda and manifest.target == "decoder"):
        return opened(captured=bool(cuda_graph)), ""
    if cuda_graph is False:
        return opened(captured=False), ""
    try:
        return _stepped(opened(captured=True)), ""
    except ExportError as error:
        reason = str(error)  # and nothing of that session is held any more: its weights would stand there twice
    decoder = opened(captured=False)  # where this fails too, it was not for the CUDA graph
    if cuda_graph:
        raise ExportError(f"{path} cannot be decoded in a CUDA graph; pass cuda_graph=False to load: {reason}")
    return decoder, reason if decoder.session.device == "cuda" else ""


def _stepped(decoder: Decoder) -> Decoder:
    cache = decoder.new_cache()
    one = torch.zeros(1, 1, dtype=torch.int64)
    cache.prefill(one, torch.ones_like(one), room=1)
    cache.decode([0])
    return decoder
