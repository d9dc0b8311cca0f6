"""Finished runs as lines of a file, so that a plan that was interrupted goes on where it was."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from .data import Splits
from .recipe import Recipe
from .run import Outcome, Run
from .suite import Learner

__all__ = ["Journal", "digest", "weights_digest"]


class Journal:
    """The outcomes of finished runs, in a JSONL file.

    A run is known by a hash of everything that decides its outcome: method, rank, learning rate and seed, the examples
    of its task, the base's weights, the training, the versions of torch, transformers and peft, and the code that
    trains (without its comments and docstrings). A change of any of them makes it another run. What runs beside it is
    no part of that: it moves the outcome as rounding does.

    Args:
        path: of the file; made if missing. What an interruption left of a last line is cut off.
        learner: how the base learns.
        base: the model that is fine-tuned.
        tasks: their examples.
        recipe: what all runs share.
        below: a hash of what the base stands on, if it is not all there is.

    Raises:
        ValueError: the file has a line that is not of a journal.
    """

    def __init__(
        self,
        path: Path,
        learner: Learner,
        base: nn.Module,
        tasks: Mapping[str, Splits],
        recipe: Recipe,
        below: str = "",
    ) -> None:
        self._path = path
        self._learner = learner
        versions = [version(package) for package in ("torch", "transformers", "peft")]
        self._shared = [versions, weights_digest(base), asdict(recipe), *filter(None, [below])]
        self._tasks = {name: digest(dict(splits)) for name, splits in tasks.items()}
        self._found = _read(path)

    def __contains__(self, run: Run) -> bool:
        return self._key(run) in self._found

    def __getitem__(self, run: Run) -> Outcome:
        return self._found[self._key(run)]

    def add(self, run: Run, outcome: Outcome) -> None:
        """Write the line of a run that has finished."""
        key = self._key(run)
        line = json.dumps({"key": key, "run": asdict(run), "outcome": asdict(outcome)})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._found[key] = outcome

    def _key(self, run: Run) -> str:
        return digest([self._shared, _code(self._learner.code), self._tasks[run.task], asdict(run)])


def digest(value: object) -> str:
    """A hash of what JSON can say.

    >>> digest([1]) == digest((1,)) != digest([2])
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _read(path: Path) -> dict[str, Outcome]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    written = path.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    if whole != written:
        path.write_bytes(whole)
    found = {}
    for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            found[entry["key"]] = Outcome(**entry["outcome"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not of a journal: {line[:60]!r}; move it away") from error
    return found


def weights_digest(model: nn.Module) -> str:
    """A hash of a model's weights."""
    found = hashlib.sha256()
    for name, weight in model.state_dict().items():
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        found.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


@cache
def _code(learner: tuple[Path, ...]) -> str:
    """A hash of the code that decides what a run does."""
    from flora_fx import adapters  # LoRA's learning rates, and where its A begins, are of this folder, too

    here = Path(__file__).parent
    files = [
        *(here / f"{name}.py" for name in ("run", "lanes", "descent", "table", "base", "methods", "beginnings")),
        *learner,
        *sorted(file for folder in adapters.__path__ for file in Path(folder).glob("*.py")),
    ]
    return digest([ast.dump(_Bare().visit(ast.parse(file.read_text(encoding="utf-8")))) for file in files])


class _Bare(ast.NodeTransformer):
    """Takes docstrings out."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node
