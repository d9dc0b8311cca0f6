"""A base as every learner loads it."""

from __future__ import annotations

from typing import Any

import torch

from flora_fx.checkpoint import load_model
from flora_fx.tasks import Task

__all__ = ["load_base"]


def load_base(directory: str, task: Task) -> Any:
    """In float32, without a word on how far it is, and so that it trains in lanes.

    Args:
        directory: of the model, or its Hub id.
        task: that it is loaded for.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = load_model(directory, dtype=torch.float32, task=task)
    model.set_attn_implementation("eager")  # of which `vmap` knows every operator
    return model
