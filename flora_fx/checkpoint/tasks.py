"""The classes that transformers has for each task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flora_fx.errors import require

__all__ = ["AUTO_CLASSES", "classes_for"]

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


def classes_for(config: Any, task: str) -> Iterator[Any]:
    """The classes that transformers has for a task of this kind of model."""
    transformers = require("transformers", "hf")
    for end in AUTO_CLASSES[task]:
        mapping = getattr(transformers, f"AutoModelFor{end}" if end else "AutoModel")._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            yield from found if isinstance(found, list | tuple) else (found,)
