"""`load_model`: check the files, choose the class, load the base, put the adapter on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.tasks import Task, check_task

from .adapter_files import adapter_file, read_adapter
from .architecture import choose, read_config
from .attach import attach, check_places, whole_weights
from .base import fit_labels, load_base
from .files import check_model_files
from .further import add_adapter, named
from .numbers import check_numbers
from .places import ADAPTER_CONFIG, resolve
from .quantized import find_quantized
from .skeleton import skeleton
from .vocabulary import resize_vocabulary

__all__ = ["load_model"]


def load_model(
    model: str | Path,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    *,
    dtype: torch.dtype | None = None,
    task: Task = "auto",
    verify: bool = True,
) -> nn.Module:
    """Load a transformers model, and an adapter on it (LoRA or FFBA), ready for `flora_fx.capture`.

    Only safetensors are read, never pickles, and no code from a checkpoint is run. The model comes back in
    eval mode. An adapter is loaded unmerged in its base's dtype: once fused the two share one weight. (PEFT
    itself would keep adapters of a half-precision base in float32.)

    Linear layers that are stored by GPTQ, AWQ (version GEMM), compressed-tensors ("pack-quantized") or bitsandbytes
    (4 bits) are `flora_fx.quantized.QuantizedLinear` with the same codes; none of these packages is needed, and no GPU.

    Args:
        model: directory with ``config.json`` and safetensors weights, or a Hub id.
        adapter: directory with ``adapter_config.json`` and ``adapter_model.safetensors``, or a Hub id; None
            for the base alone. Adapters of mlx-lm and of kohya's scripts are read, too, where they fit the model. Or
            several by name, of which the first is active.
        dtype: of the weights; None keeps the checkpoint's own. Quantized weights keep their codes and scales.
        task: what the model is for, ``"sequence-classification"`` for instance, and with that its head;
            ``"encoder"`` is without a head. ``"auto"``: what the adapter was trained for, else what config.json
            names. The head of a classifier may come from the adapter, with as many labels as it has.
        verify: compare the SHA-256 of every file that has one in a ``SHA256SUMS`` beside it, or in the Hub's cache
            (about a second per 1.5 GB).

    Returns:
        A ``PreTrainedModel``, or with an adapter a ``PeftModel`` around it.

    Raises:
        CheckpointNotFoundError: a directory, its config or some of its weights are missing.
        AdapterError: files that cannot be read (truncated, pickles only) or are not what was saved, weights that have
            no place in the model or are missing, an adapter of another kind, one that holds NaN or Inf, or whose
            tensors do not fit this model; quantized layers that cannot be held as they are.
        MissingExtraError: transformers or peft is not installed.
        ValueError: an unknown task; no name, or one that an adapter cannot have.

    >>> load_model("./no-such-directory")
    Traceback (most recent call last):
    ...
    flora_fx.errors.CheckpointNotFoundError: no directory './no-such-directory'; check the path
    """
    check_task(task)
    name, adapter, others = named(adapter)
    directory = resolve(model)
    check_model_files(directory, verify=verify)
    place = None if adapter is None else resolve(adapter)
    path = None if place is None else adapter_file(place)
    settings: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    config = read_config(directory)
    if place is not None and path is not None:
        modules = None
        if not (place / ADAPTER_CONFIG).is_file():  # the names of its tensors are told by the model's
            shell = skeleton(choose(config, task, {}, directory).model_class, config)
            modules = [name for name, _ in shell.named_modules()]
        settings, tensors = read_adapter(place, verify=verify, modules=modules)
        check_numbers(tensors, path)
    quantized = find_quantized(directory, config)
    choice = choose(config, task, settings, directory)
    supplied = whole_weights(tensors)
    if path is not None:
        shell = skeleton(choice.model_class, config)
        check_places(shell, choice, config, tensors, path)
        fit_labels(shell, config, supplied)
        if quantized is not None:
            quantized.check_adapter(settings, tensors, supplied, path)
    base = load_base(directory, choice, config, dtype=dtype, supplied=supplied, quantized=quantized)
    if path is None:
        return base.eval()
    resize_vocabulary(base, settings, tensors, supplied, path)
    loaded = attach(base, choice, settings, tensors, path, name)
    for further, source in others.items():
        add_adapter(loaded, further, source, verify=verify)
    return loaded.eval()
