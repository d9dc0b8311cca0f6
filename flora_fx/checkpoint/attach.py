"""A PEFT adapter on its base: every tensor in its place, none left over, none missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flora_fx.errors import AdapterError, FloraError, require

from .adapter_files import METHODS
from .architecture import Choice
from .layouts import PREFIX
from .places import ADAPTER_CONFIG
from .skeleton import tasks_that_hold, told
from .wording import all_lines, examples, shape

__all__ = ["attach", "attach_further", "check_places", "check_shapes", "whole_weights"]

_PARTS = (*METHODS.values(), ".token_adapter.")
_OF_BASE = re.compile(r"\.(token_adapter\.base_layer|base_layer|original_module)\.")
"""Where PEFT keeps a weight of the base that something was put around."""


def whole_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of an adapter's tensors, those that stand in the place of a weight of the base, by the name of that.

    >>> import torch
    >>> head, part = torch.ones(2, 3), torch.ones(4, 3)
    >>> list(whole_weights({"base_model.model.score.weight": head, "base_model.model.q.lora_A.weight": part}))
    ['score.weight']
    """
    named = {key: _name_in_base(key) for key in tensors}
    # What was trained in a weight's place has its name; the weight itself, where it was saved, is under a longer one.
    longest_first = sorted(named, key=len, reverse=True)
    return {named[key]: tensors[key] for key in longest_first if not any(part in named[key] for part in _PARTS)}


def _name_in_base(key: str) -> str:
    """
    >>> _name_in_base("base_model.model.lm_head.base_layer.weight")
    'lm_head.weight'
    """
    return _OF_BASE.sub(".", key.removeprefix(PREFIX))


def check_shapes(base: nn.Module, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Compare A (r × d_in) and B (d_out × r) with the projections they stand beside, and with each other.

    Raises:
        AdapterError: they differ.
    """
    modules = dict(base.named_modules())
    for key, down in tensors.items():
        owner, found, _ = key.partition(".lora_A")
        name = owner.removeprefix(PREFIX)
        up = tensors.get(key.replace(".lora_A", ".lora_B"))
        weight = getattr(modules.get(name), "weight", None)
        if not found or up is None or weight is None or not down.ndim == up.ndim == weight.ndim == 2:
            continue
        d_out, d_in = _sizes(modules[name], weight)
        rank = down.shape[0]
        for tensor, expected, label in (
            (down, (rank, d_in), key),
            (up, (d_out, rank), key.replace("lora_A", "lora_B")),
        ):
            if tuple(tensor.shape) != expected:
                raise AdapterError(
                    f"{path}: {label} is {shape(tensor.shape)} and {name} ({shape((d_out, d_in))}) "
                    f"at rank {rank} needs {shape(expected)}; is it the adapter of another model?"
                )


def _sizes(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    """d_out, d_in."""
    if isinstance(module, nn.Linear):  # one that is quantized has a weight of another shape
        return module.out_features, module.in_features
    rows, columns = weight.shape
    # GPT-2 stores its projections transposed.
    return (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)


def attach(
    base: nn.Module,
    choice: Choice,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    path: Path,
    name: str = "default",
) -> nn.Module:
    """Put an adapter on its base.

    Args:
        base: a transformers model.
        choice: why it is of its class.
        settings: as in ``adapter_config.json``.
        tensors: by PEFT's names.
        path: of the tensors, for messages.
        name: of the adapter in the model.

    Returns:
        a ``PeftModel`` with the adapter in the base's dtype.

    Raises:
        AdapterError: PEFT cannot make it, or a tensor has no place, another shape, or is missing.
    """
    peft = require("peft", "hf")
    classes = require("peft.auto", "hf").MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    def make(config: Any) -> Any:
        return classes.get(config.task_type, peft.PeftModel)(base, config, name, autocast_adapter_dtype=False)

    other = f"another model, or of another task than {type(base).__name__} was loaded for ({choice.reason})"
    return _placed(base, make, settings, tensors, path, name, other)


def attach_further(
    model: Any, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, name: str
) -> None:
    """Put one more adapter beside those that a ``PeftModel`` has; it is not active.

    Args:
        model: the model, changed in place.
        settings, tensors, path, name: as for `attach`.

    Raises:
        AdapterError: as `attach`.
    """

    def make(config: Any) -> Any:
        model.add_adapter(name, config, autocast_adapter_dtype=False)
        return model

    _placed(model.base_model.model, make, settings, tensors, path, name, "another model")


def _placed(
    base: nn.Module,
    make: Callable[[Any], Any],
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    path: Path,
    adapter: str,
    other: str,
) -> nn.Module:
    """The model that ``make`` makes of a configuration, with the tensors in it."""
    peft = require("peft", "hf")
    require("flora_fx.adapters", "hf")  # makes FFBA known to PEFT
    check_shapes(base, path, tensors)
    name = type(base).__name__
    try:
        told = peft.PeftConfig.check_kwargs(
            **{key: value for key, value in settings.items() if key != "runtime_config"}
        )
        peft_config = peft.PeftConfig.from_peft_type(**told)
        peft_config.inference_mode = True
        model: nn.Module = make(peft_config)
        expected = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        _compare(expected, tensors, settings, name, path)
        placed = peft.set_peft_model_state_dict(model, dict(tensors), adapter_name=adapter)
    except FloraError:
        raise
    except ImportError as error:
        raise AdapterError(
            f"{path.parent / ADAPTER_CONFIG}: PEFT needs a package for this adapter that is not installed "
            f"({all_lines(error)}){_start(settings)}; install it"
        ) from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise AdapterError(
            f"{path.parent} does not fit {name} ({all_lines(error)}){_start(settings)}; is it the adapter of {other}?"
        ) from error
    others = [f".{known}." for known in getattr(model, "peft_config", ()) if known != adapter]
    missing = sorted(
        key
        for key in placed.missing_keys
        if any(part in key for part in METHODS.values()) and not any(part in f"{key}." for part in others)
    )
    _refuse_keys(sorted(placed.unexpected_keys), "tensors have no place in this model", name, path)
    _refuse_keys(missing, f"tensors that {ADAPTER_CONFIG} asks for are missing", name, path)
    return model


def check_places(shell: nn.Module, choice: Choice, config: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Is the adapter one of this class, as far as the names of its layers tell? No weight is read.

    Names that PEFT and transformers have changed since are left to them.

    Args:
        shell: of the class that will be loaded, see `skeleton`.
        choice: of that class.
        config: of the base.
        tensors: of the adapter.
        path: of the adapter, for messages.

    Raises:
        AdapterError: it is of another class of the same model, or of another model.
    """
    known = {name for name, _ in shell.named_modules()} | set(shell.state_dict())
    wanted = {name.partition(".lora_")[0].partition(".token_adapter.")[0] for name in _places(tensors)}
    lost = sorted(wanted - known)
    if not lost:
        return
    name = choice.model_class.__name__
    if held := tasks_that_hold(wanted, config):
        raise AdapterError(
            f"{path}: the adapter is one of {' or '.join(list(held.values())[:3])}, and the model is loaded as {name} "
            f"({choice.reason}), which has no {lost[0]}; {told(held)}"
        )
    if choice.replaces_head and len(lost) == len(wanted):
        _refuse_keys(sorted(tensors), "tensors have no place in this model", name, path)


def _places(tensors: Mapping[str, Tensor]) -> set[str]:
    return {_name_in_base(key) for key in tensors if METHODS["FLORA"] not in key and key.startswith(PREFIX)}


def _compare(
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    name: str,
    path: Path,
) -> None:
    """Shapes, and whole weights that PEFT would look for by a name that is not there."""
    for key, tensor in tensors.items():
        wanted = expected.get(key)
        if wanted is not None and tensor.shape != wanted.shape:
            rank = f" at rank {settings.get('r')}" if METHODS["LORA"] in key else ""
            raise AdapterError(
                f"{path} does not fit {name}: {key} is {shape(tensor.shape)}, and with {ADAPTER_CONFIG}{rank} it "
                f"has to be {shape(wanted.shape)}; put the {ADAPTER_CONFIG} there that was saved with it, or pass the "
                "model that it was trained on"
            )
    lost = sorted(key for key in expected.keys() - tensors.keys() if not any(part in key for part in METHODS.values()))
    _refuse_keys(lost, f"tensors that {ADAPTER_CONFIG} asks for are missing", name, path)


def _refuse_keys(keys: list[str], what: str, name: str, path: Path) -> None:
    if keys:
        raise AdapterError(
            f"{path} does not fit {name}: {len(keys)} {what}{examples(keys)}; is it the adapter of another model?"
        )


def _start(settings: Mapping[str, Any]) -> str:
    start = settings.get("init_lora_weights")
    return f"; init_lora_weights={start!r} computes on the base as it is loaded" if isinstance(start, str) else ""
