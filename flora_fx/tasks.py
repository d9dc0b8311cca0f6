"""The tasks that a model can be loaded for. Nothing else is imported: the command line's help lists them."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["Task", "check_task"]

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


def check_task(task: str) -> None:
    """
    Raises:
        ValueError: no task that is known.
    """
    if task not in get_args(Task):
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(map(repr, get_args(Task)))}")
