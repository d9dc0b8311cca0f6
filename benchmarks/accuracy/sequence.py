"""The suite of sequence tasks: a small Llama, pretrained on the spot, or with examples of its own any causal model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_fx.checkpoint import load_tokenizer
from flora_fx.errors import AdapterError
from flora_fx.progress import Bar

from . import data, tasks
from .data import Splits
from .generation import Generation
from .methods import FULL, METHODS
from .model import pretrained
from .recipe import Recipe
from .suite import Prepared, Suite

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["SEQUENCE"]


def _prepare(plan: Plan, folder: Path, progress: Bar) -> Prepared:
    if plan.model is not None:
        learner = Generation(plan.model)
        base: Any = learner.load()
        return Prepared(learner, base, _encoded(plan, plan.model, base.config.max_position_embeddings), plan.model)
    learner = Generation(str(pretrained(plan.pretraining, folder, progress("pretrain"))))
    described = asdict(plan.pretraining) | {"tasks": list(tasks.PRETRAINING)}
    return Prepared(learner, learner.load(), {name: tasks.splits(name) for name in plan.task_names}, described)


def _encoded(plan: Plan, model: str, longest: int) -> dict[str, Splits]:
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise AdapterError(f"{model} has no tokenizer; save one beside the model")
    rows = (row for row in plan.rows if row.task in plan.task_names)
    encoded = data.encode(rows, tokenizer, longest=longest)
    return {name: encoded[name] for name in plan.task_names}


SEQUENCE = Suite(
    name="sequence",
    measured="exact match",
    tasks=tasks.COMPARED,
    prepare=_prepare,
    admitted=None,
    methods=(FULL, *METHODS),
    budgets=(2, 8),
    rates=(2.4e-3, 5.5e-3, 1.3e-2, 3e-2),
    seeds=4,
    tuning_seeds=1,
    recipe=Recipe(steps=300),
)
"""Made for a model of 0.3M parameters: a training takes seconds."""
