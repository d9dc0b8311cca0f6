"""Which class of transformers a checkpoint is loaded as: the one that it says it is, unless somebody knows better.

In this order: the task that is asked for; the task that the adapter was trained for; ``architectures`` in config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_fx.errors import AdapterError, require
from flora_fx.tasks import Task

from .tasks import AUTO_CLASSES, classes_for
from .wording import all_lines

__all__ = ["Choice", "choose", "read_config"]

_OF_TASK_TYPE = {
    "CAUSAL_LM": ("causal-lm", "image-text-to-text", "seq2seq-lm"),
    "SEQ_2_SEQ_LM": ("seq2seq-lm", "image-text-to-text"),
    "SEQ_CLS": (
        *("sequence-classification", "image-classification", "audio-classification", "video-classification"),
        "multiple-choice",
    ),
    "TOKEN_CLS": ("token-classification", "audio-frame-classification"),
    "QUESTION_ANS": ("question-answering", "document-question-answering", "visual-question-answering"),
    "FEATURE_EXTRACTION": ("encoder",),
}
"""What a PEFT ``task_type`` may mean; the first that the model has, unless the checkpoint is one of them already."""


@dataclass(frozen=True)
class Choice:
    """A class to load a checkpoint as.

    Attributes:
        model_class: a ``PreTrainedModel``.
        replaces_head: it is not the class that config.json names, so that the checkpoint's head may be left out.
        reason: who chose it, for messages.
    """

    model_class: Any
    replaces_head: bool
    reason: str


def read_config(directory: Path) -> Any:
    """The config of a checkpoint, as transformers has it.

    Raises:
        AdapterError: transformers does not know the model, or cannot read its config.
    """
    transformers = require("transformers", "hf")
    try:
        return transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # configs check their values, each in its own way
        raise AdapterError(f"{directory}: transformers cannot load this model ({all_lines(error)})") from error


def choose(config: Any, task: Task, settings: Mapping[str, Any], directory: Path) -> Choice:
    """The class to load.

    Args:
        config: of the checkpoint.
        task: that is asked for.
        settings: of the adapter; empty without one.
        directory: of the checkpoint, for messages.

    Raises:
        AdapterError: transformers has no such class for this model.
    """
    own = _own(config)
    if task != "auto":
        return _for_tasks(config, own, (task,), f"task={task!r}") or _refuse(config, own, task, directory)
    kind = settings.get("task_type")
    if kind in _OF_TASK_TYPE:
        reason = f"the adapter's task_type {kind}"
        if (found := _for_tasks(config, own, _OF_TASK_TYPE[kind], reason)) is not None:
            return found
    elif (trained := _named((settings.get("auto_mapping") or {}).get("base_model_class"), config)) is not None:
        return Choice(trained, trained is not own, "the adapter's auto_mapping")
    if own is None:
        named = ", ".join(config.architectures or []) or "no architecture"
        raise AdapterError(
            f"{directory / 'config.json'} names {named}, which transformers {require('transformers', 'hf').__version__}"
            f" does not have for a {type(config).__name__}; pass the task that the model is for (task=, --task)"
        )
    return Choice(own, False, "config.json")


def _refuse(config: Any, own: Any, task: str, directory: Path) -> Choice:
    named = "" if own is None else f", and this one is a {own.__name__}"
    raise AdapterError(
        f"{directory}: transformers has no model for task {task!r} with a {type(config).__name__}{named}; leave the "
        "task out or pass another"
    )


def _own(config: Any) -> Any:
    """The class that ``architectures`` names, or one for the same task where its name is not today's."""
    names = list(config.architectures or [])
    for name in names:
        if (found := _named(name, config)) is not None:
            return found
    for task, ends in AUTO_CLASSES.items():
        if any(end and name.endswith((f"For{end}", *_OLD_ENDS.get(task, ()))) for name in names for end in ends):
            return next(iter(classes_for(config, task)), None)
    return None if names else next(iter(classes_for(config, "encoder")), None)


_OLD_ENDS = {"causal-lm": ("LMHeadModel",)}


def _for_tasks(config: Any, own: Any, tasks: tuple[str, ...], reason: str) -> Choice | None:
    known = [found for task in tasks for found in classes_for(config, task)]
    if own is not None and own in known:
        return Choice(own, False, reason)
    return Choice(known[0], True, reason) if known else None


def _named(name: Any, config: Any) -> Any:
    """A class of transformers by its name, if it is for this kind of config; no other code is looked at."""
    transformers = require("transformers", "hf")
    if not isinstance(name, str):
        return None
    try:
        found: Any = getattr(transformers, name, None)
    except (ImportError, RuntimeError):  # its module needs a package that is not installed
        return None
    fits = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if fits and found.config_class is type(config) else None
