"""What models are for: the tasks that can be asked for, and the classes that transformers has for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

from flora_fx.errors import require

__all__ = ["AUTO_CLASSES", "Task", "check_task", "classes_for"]

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

AUTO_CLASSES: dict[str, tuple[str, ...]] = {
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


def check_task(task: str) -> None:
    """
    Raises:
        ValueError: no task that is known.
    """
    if task not in get_args(Task):
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(map(repr, get_args(Task)))}")


def classes_for(config: Any, task: str) -> Iterator[Any]:
    """The classes that transformers has for a task of this kind of model."""
    transformers = require("transformers", "hf")
    for end in AUTO_CLASSES[task]:
        mapping = getattr(transformers, f"AutoModelFor{end}" if end else "AutoModel")._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            yield from found if isinstance(found, list | tuple) else (found,)
