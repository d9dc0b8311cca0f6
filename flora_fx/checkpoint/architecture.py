"""Which class of transformers a checkpoint is loaded as: the one that it says it is, unless somebody knows better.

In this order: the task that is asked for; the task that the adapter was trained for; ``architectures`` in config.json.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from flora_fx.errors import AdapterError, require

from .wording import whole

__all__ = ["Choice", "Task", "check_task", "choose", "classes_for", "read_config", "skeleton", "task_that_holds"]

Task = Literal[
    "auto",
    "causal-lm",
    "seq2seq-lm",
    "encoder",
    "masked-lm",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
    "next-sentence-prediction",
    "pretraining",
    "image-text-to-text",
    "image-classification",
    "zero-shot-image-classification",
    "video-classification",
    "masked-image-modeling",
    "image-segmentation",
    "semantic-segmentation",
    "object-detection",
    "depth-estimation",
    "document-question-answering",
    "visual-question-answering",
    "audio-classification",
    "audio-frame-classification",
    "audio-xvector",
    "ctc",
]

_AUTO_CLASSES: dict[str, tuple[str, ...]] = {
    "causal-lm": ("CausalLM",),
    "seq2seq-lm": ("Seq2SeqLM", "SpeechSeq2Seq"),
    "encoder": ("",),
    "masked-lm": ("MaskedLM",),
    "sequence-classification": ("SequenceClassification",),
    "token-classification": ("TokenClassification",),
    "question-answering": ("QuestionAnswering",),
    "multiple-choice": ("MultipleChoice",),
    "next-sentence-prediction": ("NextSentencePrediction",),
    "image-text-to-text": ("ImageTextToText", "MultimodalLM"),
    "image-classification": ("ImageClassification",),
    "zero-shot-image-classification": ("ZeroShotImageClassification",),
    "video-classification": ("VideoClassification",),
    "masked-image-modeling": ("MaskedImageModeling",),
    "image-segmentation": ("ImageSegmentation", "UniversalSegmentation", "InstanceSegmentation"),
    "semantic-segmentation": ("SemanticSegmentation",),
    "object-detection": ("ObjectDetection", "ZeroShotObjectDetection"),
    "depth-estimation": ("DepthEstimation",),
    "document-question-answering": ("DocumentQuestionAnswering",),
    "visual-question-answering": ("VisualQuestionAnswering",),
    "audio-classification": ("AudioClassification",),
    "audio-frame-classification": ("AudioFrameClassification",),
    "audio-xvector": ("AudioXVector",),
    "ctc": ("CTC",),
    "pretraining": ("PreTraining",),
}
"""By task, how the names of transformers' auto classes end: ``AutoModelFor…``; ``AutoModel`` itself is the encoder."""

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


def check_task(task: str) -> None:
    """
    Raises:
        ValueError: no task that is known.
    """
    if task not in get_args(Task):
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(map(repr, get_args(Task)))}")


def read_config(directory: Path) -> Any:
    """The config of a checkpoint, as transformers has it.

    Raises:
        AdapterError: transformers does not know the model, or cannot read its config.
    """
    transformers = require("transformers", "hf")
    try:
        return transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # configs check their values, each in its own way
        raise AdapterError(f"{directory}: transformers cannot load this model ({whole(error)})") from error


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
        told = ", ".join(config.architectures or []) or "no architecture"
        raise AdapterError(
            f"{directory / 'config.json'} names {told}, which transformers {require('transformers', 'hf').__version__} "
            f"does not have for a {type(config).__name__}; pass the task that the model is for (task=, --task)"
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
    for task, ends in _AUTO_CLASSES.items():
        if any(end and name.endswith((f"For{end}", *_OLD_ENDS.get(task, ()))) for name in names for end in ends):
            return next(iter(classes_for(config, task)), None)
    return None if names else next(iter(classes_for(config, "encoder")), None)


_OLD_ENDS = {"causal-lm": ("LMHeadModel",)}


def _for_tasks(config: Any, own: Any, tasks: tuple[str, ...], reason: str) -> Choice | None:
    known = [found for task in tasks for found in classes_for(config, task)]
    if own is not None and own in known:
        return Choice(own, False, reason)
    return Choice(known[0], True, reason) if known else None


def classes_for(config: Any, task: str) -> Iterator[Any]:
    """The classes that transformers has for a task of this kind of model."""
    transformers = require("transformers", "hf")
    for end in _AUTO_CLASSES[task]:
        mapping = getattr(transformers, f"AutoModelFor{end}" if end else "AutoModel")._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            yield from found if isinstance(found, list | tuple) else (found,)


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


# --- without weights --------------------------------------------------------------------------------------


def skeleton(model_class: Any, config: Any) -> nn.Module:
    """A model of a class whose weights have shapes and no memory.

    Raises:
        AdapterError: the class cannot be made with this config.
    """
    try:
        with torch.device("meta"):
            return model_class._from_config(copy.deepcopy(config))
    except Exception as error:  # each model class checks its config in its own way
        raise AdapterError(f"{model_class.__name__} cannot be made with this config ({whole(error)})") from error


def task_that_holds(names: Set[str], config: Any) -> tuple[str, str] | None:
    """A task whose class has modules or weights of all these names, and the class's name; for remedies.

    Args:
        names: of modules or parameters.
        config: of the checkpoint.
    """
    for task in _AUTO_CLASSES:
        for model_class in classes_for(config, task):
            try:
                model = skeleton(model_class, config)
            except AdapterError:
                continue
            known = {name for name, _ in model.named_modules()} | set(model.state_dict())
            if names <= known:
                return task, model_class.__name__
    return None
