"""`export_onnx`: capture, fuse, translate, check, write."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.config import FuseConfig
from flora_fx.errors import ExportError, require
from flora_fx.fusing import fuse, report

from .checking import check
from .directory import staged
from .lowering import lower
from .manifest import DATA, MANIFEST, MODEL, Manifest, versions, write_manifest
from .result import ExportResult
from .session import DEFAULT_PROVIDERS, usable_providers
from .source import DTYPES, kind_of, private_copy, unwrap
from .tracing import Traced, trace

__all__ = ["ONNX_FORMS", "export_onnx"]

ONNX_FORMS = FuseConfig(layout="beside", up="per_projection", accumulate="add", fold_scale=True)
"""The fused forms for ONNX Runtime."""


def export_onnx(
    model: nn.Module,
    directory: str | Path,
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    providers: Sequence[Any] = DEFAULT_PROVIDERS,
    overwrite: bool = False,
    config: FuseConfig | None = None,
    progress: Callable[[str], None] | None = None,
) -> ExportResult:
    """Write a model with its adapters fused in as a directory for ONNX Runtime, and check it there.

    The directory holds ``model.onnx`` and ``model.onnx.data``, ``config.json``, ``generation_config.json``, the
    tokenizer's files and ``flora_fx.json``. It appears when all is written and checked; on any error there is
    nothing, or what was there before. The model is left as it is: mode, dtype, weights, config.

    Args:
        model: a transformers causal LM or encoder, or a PEFT model around it with LoRA or FFBA adapters (the active
            ones are exported, unmerged).
        directory: to write; missing parents are made.
        example_inputs: by name, batch first; needed for encoders whose inputs cannot be guessed.
        tokenizer: a transformers tokenizer to save beside the model.
        dtype: float32, float16 or bfloat16, to cast to; None for the model's own.
        providers: ONNX Runtime execution providers for the check; those that this machine lacks are passed over.
        overwrite: replace an earlier export.
        config: the fused forms; None for `ONNX_FORMS`.
        progress: called with the name of each stage as it begins.

    Returns:
        where it is, what was fused, how far it is from PyTorch.

    Raises:
        ExportError: the model is of another kind, cannot be captured or translated, does not agree with PyTorch on
            ONNX Runtime, or the directory must not be written.
        TypeError: ``model`` is no module, ``dtype`` no dtype, ``config`` no `FuseConfig`.
        AdapterError: an adapter weight holds NaN or infinity.
        MissingExtraError: transformers, onnx, onnxscript or onnxruntime is not installed.

    The graph of a causal LM is prefill and decode in one, with onnxruntime-genai's names: ``input_ids`` [batch, seq],
    ``attention_mask`` [batch, past + seq], ``past_key_values.N.key`` and ``.value`` [batch, kv_heads, past, head_dim]
    in; ``logits`` [batch, seq, vocab], ``present.N.key`` and ``.value`` out. Positions are counted from the mask.

    >>> print(export_onnx(peft_model, "out", tokenizer=tokenizer))  # doctest: +SKIP
    exported to /home/me/out: 210 adapters fused, 0 declined
    ...
    >>> prompt = tokenizer("Once upon", return_tensors="pt")  # doctest: +SKIP
    >>> tokenizer.batch_decode(load("out").generate(**prompt, max_new_tokens=40))  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a transformers or PEFT model")
    if dtype is not None and dtype not in DTYPES.values():
        raise TypeError(f"dtype is {dtype!r}; it must be one of {', '.join(f'torch.{name}' for name in DTYPES)}")
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx")
    usable_providers(providers)  # before the work, not after
    core = unwrap(model)
    kind = kind_of(core)
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        if progress is not None:
            progress(name)
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    target = Path(directory).absolute()
    with staged(target, overwrite=overwrite, marker=MANIFEST) as place:
        with stage("capture"):
            reference = private_copy(core, dtype)
            traced = trace(reference, kind, example_inputs)
        with stage("fuse"):
            fused = fuse(traced.program, config=config or ONNX_FORMS)
            fusion = report(fused)
        with stage("translate"):
            graph = lower(fused, traced)
        with stage("write"):
            require("onnx_ir", "onnx").save(graph, place / MODEL, external_data=DATA)
            manifest = _manifest(core, reference, traced, kind)
            del graph, fused, traced  # they hold the packs: a second copy of the weights, not needed for the check
            _write_companions(core, reference, place, tokenizer)
        with stage("check"):
            checked = check(place, manifest, reference, providers)
            manifest = replace(manifest, fusion=fusion.to_dict(), check=asdict(checked))
        with stage("seal"):
            files = write_manifest(place, manifest)
    return ExportResult(target, fusion, **asdict(checked), files=files, seconds=seconds)


def _manifest(core: nn.Module, reference: nn.Module, traced: Traced, kind: Any) -> Manifest:
    config: Any = core.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    generation = getattr(core, "generation_config", None)
    weights = next(p.dtype for p in reference.parameters() if p.is_floating_point())
    names = {value: name for name, value in DTYPES.items()}
    if weights not in names:
        raise ExportError(f"the model's weights are {weights}; pass dtype= one of {', '.join(DTYPES)}")

    def token(name: str) -> Any:
        found = getattr(generation, name, None)
        return getattr(text, name, None) if found is None else found

    ends = token("eos_token_id")
    return Manifest(
        kind=kind,
        architecture=type(core).__name__,
        dtype=names[weights],
        inputs=list(traced.inputs),
        outputs=list(traced.outputs),
        layers=traced.layers,
        kv_heads=traced.kv_heads,
        head_dim=traced.head_dim,
        vocab_size=getattr(text, "vocab_size", None) or 0,
        max_positions=getattr(text, "max_position_embeddings", None) or 0,
        eos_token_ids=[] if ends is None else [ends] if isinstance(ends, int) else list(ends),
        pad_token_id=token("pad_token_id"),
        versions=versions(),
    )


def _write_companions(core: nn.Module, reference: nn.Module, place: Path, tokenizer: Any) -> None:
    """``config.json``, ``generation_config.json`` and the tokenizer's files."""
    config: Any = copy.deepcopy(reference.config)
    config.architectures = [type(core).__name__]
    config.to_json_file(place / "config.json")
    generation: Any = getattr(core, "generation_config", None)
    if generation is not None:
        generation.to_json_file(place / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(place)
