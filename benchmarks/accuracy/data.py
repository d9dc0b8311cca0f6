"""Examples as tokens, and how they are read from JSONL: a prompt and an answer, in named splits of named tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flora_fx.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SPLITS", "Example", "Row", "Splits", "encode", "read"]

SPLITS = ("train", "validation", "test")


class Example(NamedTuple):
    """Token ids of a prompt and of the answer that is to follow it, with its end."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


Splits = Mapping[str, Sequence[Example]]
"""The examples of one task by split."""


class Row(NamedTuple):
    """One line of the file; the fields are its keys."""

    task: str
    split: str
    prompt: str
    answer: str


def read(path: Path) -> list[Row]:
    """Read ``{"task": …, "split": "train" | "validation" | "test", "prompt": …, "answer": …}``, one a line.

    Raises:
        ValueError: a line that is not such an object, or a task that lacks a split; the message names line or task.
        FileNotFoundError: no such file.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            rows.append(_row(line, f"{path}, line {number}"))
    if not rows:
        raise ValueError(f"{path} has no examples")
    for task in dict.fromkeys(row.task for row in rows):
        found = {row.split for row in rows if row.task == task}
        if missing := [split for split in SPLITS if split not in found]:
            raise ValueError(f"{path}: task {task!r} has no examples with split {' or '.join(map(repr, missing))}")
    return rows


def _row(line: str, where: str) -> Row:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: an object is expected, not {line.strip()[:40]}")
    for name in Row._fields:
        if name not in fields:
            raise ValueError(f"{where}: the field {name!r} is missing")
        if not isinstance(fields[name], str) or not fields[name]:
            raise ValueError(f"{where}: {name} is {fields[name]!r}; it must be a string that is not empty")
    if fields["split"] not in SPLITS:
        raise ValueError(f"{where}: split is {fields['split']!r}; it must be one of {', '.join(SPLITS)}")
    return Row(**{name: fields[name] for name in Row._fields})


def encode(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, *, longest: int) -> dict[str, Splits]:
    """The rows as tokens, by task and split.

    Prompt and answer are tokenized apart: a space between them belongs to one of the two. The answer ends with the
    tokenizer's end-of-sequence token, if it has one.

    Args:
        rows: of the file.
        tokenizer: of the model.
        longest: tokens that the model takes.

    Raises:
        AdapterError: an example is longer than that, or its prompt has no tokens.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tasks: dict[str, dict[str, list[Example]]] = {}
    for row in rows:
        prompt = tokenizer(row.prompt)["input_ids"]
        answer = [*tokenizer(row.answer, add_special_tokens=False)["input_ids"], *end]
        if not prompt or len(prompt) + len(answer) > longest:
            raise AdapterError(
                f"task {row.task!r}, {row.split}: the example {row.prompt[:40]!r} has {len(prompt)} + {len(answer)} "
                f"tokens; the model takes 1 to {longest}"
            )
        tasks.setdefault(row.task, {}).setdefault(row.split, []).append(Example(tuple(prompt), tuple(answer)))
    return dict(tasks)
