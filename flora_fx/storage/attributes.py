"""Let a graph module's code go through each of its submodules once: a step of that way takes as long as an addition.

before    W = getattr(self.model.layers, "0").q.weight        after    at_0 = self.model
          A = getattr(self.model.layers, "0").q.A                      at_1 = at_0.layers
                                                                       at_2 = getattr(at_1, "0")
                                                                       at_3 = at_2.q
                                                                       W = at_3.weight
                                                                       A = at_3.A
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import count

from torch.fx import Graph

__all__ = ["share_ways"]

_READ = re.compile(
    r'(?P<name>\w+(?: ?: ?[^=]+)?) = (?P<way>(?:getattr\()*self(?:\.\w+|, "[^"]+"\))+)(?P<rest>(?:;.*)?\s*)'
)
_STEP = re.compile(r'\.(\w+)|, "([^"]+)"\)')


def share_ways(graph: Graph) -> None:
    """From now on the graph's code is written so."""

    def shared(current: Callable[[list[str]], list[str]] | None) -> Callable[[list[str]], list[str]]:
        return _shared if current in (None, _shared) else current  # somebody else's stays

    graph.on_generate_code(shared)


def _shared(body: list[str]) -> list[str]:
    """The lines of a forward.

    >>> _shared(['w = self.a.w\\n', 'b = getattr(self.a, "0").b;  w = None\\n', 'return b'])
    ['at_0 = self.a\\n', 'w = at_0.w\\n', 'at_1 = getattr(at_0, "0")\\n', 'b = at_1.b;  w = None\\n', 'return b']
    """
    taken = set(re.findall(r"\bat_\d+\b", "".join(body)))
    names = (name for name in (f"at_{index}" for index in count()) if name not in taken)
    known: dict[Sequence[str], str] = {(): "self"}
    lines = []
    for line in body:
        read = _READ.fullmatch(line)
        if read is None:
            lines.append(line)
            continue
        steps = tuple(plain or quoted for plain, quoted in _STEP.findall(read["way"]))
        for length in range(1, len(steps)):
            if steps[:length] not in known:
                known[steps[:length]] = name = next(names)
                lines.append(f"{name} = {_step(known[steps[: length - 1]], steps[length - 1])}\n")
        lines.append(f"{read['name']} = {_step(known[steps[:-1]], steps[-1])}{read['rest']}")
    return lines


def _step(holder: str, name: str) -> str:
    return f"{holder}.{name}" if name.isidentifier() else f'getattr({holder}, "{name}")'
