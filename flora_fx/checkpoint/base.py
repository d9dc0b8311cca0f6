"""The weights of a base: all of the class that it is loaded as, and all that are in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.errors import AdapterError

from .architecture import Choice
from .quantized import Quantized
from .skeleton import skeleton, tasks_that_hold, told
from .tasks import classes_for
from .wording import all_lines, examples, shape

__all__ = ["fit_labels", "load_base"]


def fit_labels(shell: nn.Module, config: Any, supplied: Mapping[str, Tensor]) -> None:
    """Set ``config.num_labels`` to what the head has that an adapter brings along.

    Args:
        shell: of the class that will be loaded, see `skeleton`.
        config: changed in place.
        supplied: whole weights from the adapter, by the names that they have in the model.
    """
    labels = getattr(config, "num_labels", None)
    if labels is None:
        return
    known = shell.state_dict()
    found = {
        tensor.shape[0]
        for name, tensor in supplied.items()
        if name in known
        and tensor.dim() == known[name].dim() > 0
        and known[name].shape[0] == labels != tensor.shape[0]
        and known[name].shape[1:] == tensor.shape[1:]
    }
    if len(found) == 1:
        config.num_labels = found.pop()


def load_base(
    directory: Path,
    choice: Choice,
    config: Any,
    *,
    dtype: torch.dtype | None,
    supplied: Iterable[str] = (),
    quantized: Quantized | None = None,
) -> nn.Module:
    """Load a base and account for every weight.

    Args:
        directory: of the checkpoint.
        choice: the class to load.
        config: to load it with.
        dtype: of the weights; None keeps the checkpoint's own.
        supplied: names of weights that the adapter brings along, so that the checkpoint need not have them.
        quantized: the layers that the checkpoint holds quantized; None leaves them to transformers.

    Raises:
        AdapterError: transformers cannot load it, weights are missing, have other shapes, or have no place.
    """
    try:
        model_class = choice.model_class if quantized is None else quantized.awaiting(choice.model_class)
        model, info = model_class.from_pretrained(
            directory,
            config=config,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # told below, with the shapes
            output_loading_info=True,
        )
    except AdapterError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        raise AdapterError(
            f"{directory}: transformers cannot load this model as {choice.model_class.__name__} ({all_lines(error)})"
        ) from error
    brought = set(supplied)
    if quantized is not None:
        quantized.place(model)
    _check_shapes(directory, model, [entry for entry in info["mismatched_keys"] if entry[0] not in brought])
    missing = sorted(set(info["missing_keys"]) - brought)
    if missing and all(key.startswith("pooler.") for key in missing):
        # An encoder trained without its pooler: a random one would be worse than none.
        model.pooler = None
    elif missing:
        _refuse_missing(directory, choice, missing)
    _check_leftovers(directory, choice, config, model, sorted(set(info["unexpected_keys"]) - brought))
    return model


def _check_shapes(directory: Path, model: nn.Module, entries: list[Any]) -> None:
    for name, saved, wanted in sorted(entries):
        raise AdapterError(
            f"{directory}: {name} is {shape(saved)} in the checkpoint and {shape(wanted)} in the "
            f"{type(model).__name__} that its config.json describes; put the config.json there that was saved with "
            "these weights"
        )


def _refuse_missing(directory: Path, choice: Choice, missing: list[str]) -> None:
    name, what = choice.model_class.__name__, f"{len(missing)} weights of"
    if choice.replaces_head:
        raise AdapterError(
            f"{directory}: {what} {name}, which {choice.reason} asks for, are neither in the checkpoint nor in the "
            f"adapter{examples(missing)}; transformers would fill them at random, as it did before the training: pass "
            "as the model the one that was trained, saved with save_pretrained(), or pass another task"
        )
    raise AdapterError(
        f"{directory}: {what} {name} are not in the checkpoint{examples(missing)}; transformers would fill them at "
        "random: save the whole model, or pass another task"
    )


def _check_leftovers(directory: Path, choice: Choice, config: Any, model: nn.Module, left: list[str]) -> None:
    """Weights of the checkpoint that the model has no place for.

    What transformers knows to be of no use is not among them. A head that another one takes the place of may go, and
    so may what pretraining left beside the model, such as BERT's pooler and next-sentence head beside its masked LM.
    """
    backbone = str(getattr(model, "base_model_prefix", ""))
    inside = {backbone, *(name for name, _ in getattr(model, backbone, model).named_children())}
    if choice.replaces_head:
        left = [key for key in left if key.split(".")[0] in inside]
    optional = _optional(config, backbone) if left else set()
    left = [key for key in left if key not in optional]
    if not left:
        return
    name = choice.model_class.__name__
    held = tasks_that_hold(set(left), config)
    if choice.replaces_head:
        remedy = f"leave out what asked for {name}: {choice.reason}"
    elif held:
        remedy = f"{' and '.join(list(held.values())[:3])} {'have' if len(held) > 1 else 'has'} them: {told(held)}"
    else:
        remedy = (
            f"save it again as the class that was trained, with save_pretrained(), or without them if {name} is meant"
        )
    raise AdapterError(
        f"{directory}: {len(left)} weights of the checkpoint have no place in {name}{examples(left)}; left out, the "
        f"outputs might be others: {remedy}"
    )


def _optional(config: Any, backbone: str) -> set[str]:
    """Weights that a model of this kind has in pretraining, or without a head."""
    found: set[str] = set()
    for task in ("pretraining", "encoder"):
        for model_class in classes_for(config, task):
            try:
                names = list(skeleton(model_class, config).state_dict())
            except AdapterError:
                continue
            found.update(names)
            found.update(f"{backbone}.{name}" for name in names)
    return found
