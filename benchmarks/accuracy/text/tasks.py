"""Candidates for the text suite: what real text is about, of what kind it is, or whether two texts belong together.

Each task's text is deduplicated, without regard to case, numbers and punctuation, and then up to one word. Sources (a
file, or a script of Unicode) are dealt to the splits whole, so that no file is in two of them; a text that two sources
share is in none. Labels are equally frequent in every split: guessing one label is right once in as many as there are.

Which candidates are compared is decided by `admitted`, of which FFBA is no part.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from ..data import SPLITS
from .phrases import Described, described, messages, parameters, signatures, words_of
from .sources import Source, order

__all__ = ["CANDIDATES", "SIZES", "Candidate", "Item", "admitted", "deal", "distinct"]

SIZES: Mapping[str, int] = {"train": 1024, "validation": 256, "test": 512}
"""Examples of a split at most; fewer where its rarest label has fewer."""

_SHARES = {"train": 0.5, "validation": 0.17, "test": 0.33}


class Item(NamedTuple):
    """A text with its label.

    Attributes:
        texts: one, or two that are to be compared.
        label: a word.
        source: that it comes from.
    """

    texts: tuple[str, ...]
    label: str
    source: str


@dataclass(frozen=True)
class Candidate:
    """A task, before it is known whether it tells methods apart.

    Attributes:
        labels: what a text is to be told to be.
        items: makes items of files; labels other than those above are left out.
        near: whether texts that differ in one word are the same.
    """

    labels: tuple[str, ...]
    items: Callable[[Sequence[Source]], Iterator[Item]] = field(repr=False)
    near: bool = True


def _packages(sources: Sequence[Source]) -> Iterator[Item]:
    for source in sources:
        yield from (Item((one.summary,), source.package, source.module) for one in described(source))


def _kinds(sources: Sequence[Source]) -> Iterator[Item]:
    for source in sources:
        yield from (Item((one.summary,), one.kind, source.module) for one in described(source))


def _errors(sources: Sequence[Source]) -> Iterator[Item]:
    for source in sources:
        yield from (Item((one.text,), one.error, source.module) for one in messages(source))


_SAME_TYPE = {"torch.Tensor": "Tensor", "string": "str", "integer": "int", "ndarray": "array", "array_like": "array"}


def _types(sources: Sequence[Source]) -> Iterator[Item]:
    for source in sources:
        for one in parameters(source):
            yield Item((one.text,), _SAME_TYPE.get(one.kind, one.kind), source.module)


def _returns(sources: Sequence[Source]) -> Iterator[Item]:
    for source in sources:
        for one in signatures(source):
            kind = _SAME_TYPE.get(one.returns, one.returns).partition("[")[0]
            yield Item((one.text,), kind, source.module)


def _names(sources: Sequence[Source]) -> Iterator[Item]:
    """A name, and its own summary or the next one's of the same file."""
    for source in sources:
        found = _once(described(source))
        for index, one in enumerate(found):
            own = order("name", source.module, one.name) < "8"
            other = found[(index + 1) % len(found)]
            if own or other is not one:
                summary = one.summary if own else other.summary
                yield Item((words_of(one.name), summary), "own" if own else "other", source.module)


def _name_kinds(sources: Sequence[Source]) -> Iterator[Item]:
    for source in sources:
        yield from (Item((words_of(one.name),), one.kind, source.module) for one in described(source))


def _arguments(sources: Sequence[Source]) -> Iterator[Item]:
    """A parameter, and what is said of it or of the next one of the same file."""
    for source in sources:
        found = list({one.text: one for one in parameters(source)}.values())
        for index, one in enumerate(found):
            own = order("argument", source.module, one.name, one.text) < "8"
            other = found[(index + 1) % len(found)]
            if own or other.name != one.name:
                yield Item(
                    (words_of(one.name), one.text if own else other.text), "own" if own else "other", source.module
                )


def _files(sources: Sequence[Source]) -> Iterator[Item]:
    """Two summaries, of one file or of two of the same package and split; no summary is in two pairs."""
    halves: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for source in sources:
        found = [one.summary for one in _once(described(source))]
        pairs = list(zip(found[::2], found[1::2], strict=False))
        for one, other in pairs:
            if order("file", one, other) < "8":
                yield Item((one, other), "one", source.module)
            else:
                halves[source.package, _split("one file or two", source.module)].append((one, source.module))
    for waiting in halves.values():
        waiting.sort(key=lambda half: order(*half))
        for (one, module), (other, another) in zip(waiting[::2], waiting[1::2], strict=False):
            if module != another:
                yield Item((one, other), "two", f"{module} {another}")


def _characters(sources: Sequence[Source]) -> Iterator[Item]:
    """Unicode 3.2, which every Python has, whatever its own version."""
    unicode = unicodedata.ucd_3_2_0
    for point in range(0x110000):
        name = unicode.name(chr(point), "")
        if name and not re.search(r"IDEOGRAPH|HANGUL SYLLABLE", name):
            yield Item((name.lower(),), unicode.category(chr(point)), re.split(r"[ -]", name)[0])


def _once(found: Iterable[Described]) -> list[Described]:
    return list({one.summary: one for one in found}.values())


CANDIDATES: dict[str, Candidate] = {
    "package of a summary": Candidate(
        ("diffusers", "matplotlib", "networkx", "numpy", "sympy", "torch", "torchao", "transformers"), _packages
    ),
    "kind of a summary": Candidate(("class", "function", "method", "property"), _kinds),
    "error of a message": Candidate(
        ("AssertionError", "NotImplementedError", "RuntimeError", "TypeError", "ValueError"), _errors
    ),
    "type of a parameter": Candidate(("Tensor", "array", "bool", "dict", "float", "int", "list", "str"), _types),
    "type of a result": Candidate(("None", "Tensor", "bool", "int", "list", "str", "tuple"), _returns),
    "name and summary": Candidate(("other", "own"), _names),
    "one file or two": Candidate(("one", "two"), _files),
    "category of a character": Candidate(("Ll", "Lo", "Lu", "Mn", "Sm", "So"), _characters, near=False),
    "kind of a name": Candidate(("class", "function", "method", "property"), _name_kinds),
    "parameter and text": Candidate(("other", "own"), _arguments),
}


def distinct(items: Iterable[Item], *, near: bool = True) -> list[Item]:
    """Those whose text no other one has, nor one that another label or source has; the first of a source stays.

    Args:
        items: of one task.
        near: whether texts of four words or more that differ in one word are the same.

    >>> a, b, c = (Item((f"Add {x} to the {y}",), "int", "f") for x, y in (("1", "sum"), ("2", "Sum"), ("it", "list")))
    >>> distinct([a, b, c]) == [a, c]
    True
    >>> distinct([a, b._replace(source="g"), c]) == [c]
    True
    """
    first: dict[str, Item] = {}
    kept: list[tuple[Item, list[str]]] = []
    shared: set[str] = set()
    for item in items:
        keys = _keys(item, near=near)
        seen = {key: first[key] for key in keys if key in first}
        shared.update(key for key, other in seen.items() if (other.label, other.source) != (item.label, item.source))
        if not seen:
            first.update(dict.fromkeys(keys, item))
            kept.append((item, keys))
    return [item for item, keys in kept if shared.isdisjoint(keys)]


def _keys(item: Item, *, near: bool) -> list[str]:
    words = re.findall(r"[^\W\d_]+", " | ".join(item.texts).lower())
    whole = " ".join(words)
    if not near or len(words) < 4:
        return [whole]
    return [" ".join((*words[:place], "*", *words[place + 1 :])) for place in range(len(words))]


def deal(task: str, candidate: Candidate, items: Iterable[Item], sizes: Mapping[str, int]) -> dict[str, list[Item]]:
    """Items by split: sources whole, labels equally frequent, in an order that means nothing.

    Args:
        task: its name, which decides how the sources are dealt.
        candidate: the task.
        items: see `distinct`.
        sizes: examples by split, at most.

    Raises:
        ValueError: a split has no example of some label.
    """
    wanted = sorted(
        (item for item in items if item.label in candidate.labels and all(item.texts)),
        key=lambda item: order(task, *item.texts),
    )
    found: dict[str, dict[str, list[Item]]] = {split: {label: [] for label in candidate.labels} for split in SPLITS}
    for item in wanted:
        if split := _split(task, item.source):
            found[split][item.label].append(item)
    dealt = {}
    for split, labelled in found.items():
        count = min(sizes[split] // len(candidate.labels), *map(len, labelled.values()))
        if not count:
            lacking = ", ".join(label for label, kept in labelled.items() if not kept)
            raise ValueError(f"task {task!r} has no {split} example of {lacking or 'each label: ask for more'}")
        dealt[split] = sorted(
            (item for kept in labelled.values() for item in kept[:count]), key=lambda item: order(*item.texts, task)
        )
    return dealt


def _split(task: str, source: str) -> str:
    """The split of a source; of a pair of them, that of both, or none."""
    found = {_dealt(order(task, part)) for part in source.split()}
    return found.pop() if len(found) == 1 else ""


def _dealt(place: str) -> str:
    share = int(place[:8], 16) / 16**8
    bounds = zip(accumulate(_SHARES.values()), SPLITS, strict=True)
    return next(split for bound, split in bounds if share < bound or split == SPLITS[-1])


SOLVED = 95.0
"""Percent right on the validation split by LoRA: above it a task is too easy to tell methods apart."""

LEARNT = 2.0
"""Points on the validation split that LoRA must be above frozen features: below it there is nothing to be learnt."""


def admitted(frozen: float, lora: float) -> str:
    """Why a task is left out, by LoRA's best learning rate on the validation split; empty where it is compared.

    Args:
        frozen: percent right by logistic regression on frozen features.
        lora: percent right by LoRA at the smallest budget, a mean over the tuning seeds.

    >>> admitted(50, 80), admitted(90, 97), admitted(50, 51)
    ('', 'LoRA solves it: 97.0%', 'LoRA learns nothing: 51.0%, frozen features 50.0%')
    """
    if lora > SOLVED:
        return f"LoRA solves it: {lora:.1f}%"
    if lora < frozen + LEARNT:
        return f"LoRA learns nothing: {lora:.1f}%, frozen features {frozen:.1f}%"
    return ""
