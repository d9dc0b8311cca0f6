"""Models without weights, which tell what a class has a place for; no file is read."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import nn

from flora_fx.errors import AdapterError

from .tasks import AUTO_CLASSES, classes_for
from .wording import all_lines

__all__ = ["skeleton", "tasks_that_hold", "told"]


def skeleton(model_class: Any, config: Any) -> nn.Module:
    """A model of a class whose weights have shapes and no memory.

    Raises:
        AdapterError: the class cannot be made with this config.
    """
    try:
        with torch.device("meta"):
            return model_class._from_config(copy.deepcopy(config))
    except Exception as error:  # each model class checks its config in its own way
        raise AdapterError(f"{model_class.__name__} cannot be made with this config ({all_lines(error)})") from error


def tasks_that_hold(names: Set[str], config: Any) -> dict[str, str]:
    """Tasks whose class has modules or weights of all these names, each with the class's name; for remedies.

    Args:
        names: of modules or parameters.
        config: of the checkpoint.
    """
    found: dict[str, str] = {}
    for task in AUTO_CLASSES:
        for model_class in classes_for(config, task):
            try:
                model = skeleton(model_class, config)
            except AdapterError:
                continue
            known = {name for name, _ in model.named_modules()} | set(model.state_dict())
            if names <= known and model_class.__name__ not in found.values():
                found[task] = model_class.__name__
    return found


def told(tasks: Mapping[str, str]) -> str:
    """What to pass, of some tasks; ``""`` of none.

    >>> told({"ctc": "Wav2Vec2ForCTC"})
    "pass task='ctc' (--task ctc)"
    >>> told({"masked-lm": "BertForMaskedLM", "pretraining": "BertForPreTraining"})
    "pass task='masked-lm' or 'pretraining' (--task masked-lm or pretraining), whichever was trained"
    """
    if not tasks:
        return ""
    names = list(tasks)[:3]
    which = ", whichever was trained" if len(names) > 1 else ""
    return f"pass task={' or '.join(map(repr, names))} (--task {' or '.join(names)}){which}"
