"""Search for a program that is fused wrongly: hypothesis draws it, `checking` says what is wrong, and it is shrunk.

The environment variable FLORA_PROFILE names how long: "ci" (1,300 graphs), "nightly" (200,000), or "brief" (200, and
what is found is not made smaller: for `tests/mutations.py`).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .captures import BRANCHING
from .checking import AFTERWARDS, Unrunnable, check, check_compiled
from .strategies import configs, programs

__all__ = ["PARTS", "PROFILE", "Counterexample", "assert_all_right", "chunks", "search"]

GRAPHS = {"brief": 200, "ci": 1300, "nightly": 200_000}
PARTS = {"quick": 0.96, "exported": 0.03, "compiled": 0.01}
"""The parts of a search, with their share of its graphs: what torch captures costs 10 to 20 times as much."""
QUICK = ("written",) * 75 + ("shaped",) * 3 + ("decomposed", "traced")
CHUNK = 500

for name, graphs in GRAPHS.items():
    settings.register_profile(
        f"flora-{name}",
        max_examples=graphs,
        phases=[Phase.generate, *([] if name == "brief" else [Phase.shrink])],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
PROFILE = settings.get_profile(f"flora-{os.environ.get('FLORA_PROFILE', 'ci')}")


class Counterexample(AssertionError):  # noqa: N818 - not an error of ours
    """A program that is fused wrongly, the smallest that was found."""


def factor() -> float:
    """How many times as long as in CI."""
    return PROFILE.max_examples / GRAPHS["ci"]


def seed_of_the_day() -> int:
    """0 in CI, so that it finds the same each time; another one every night."""
    return 0 if factor() <= 1 else int(time.time() // 86400)


def chunks(part: str, total: int, seed: int, shares: Mapping[str, float] = PARTS) -> Iterator[tuple[str, int, int]]:
    """The share that a part has of a search, in pieces, (part, count, seed): hypothesis remembers all it has drawn."""
    count = round(total * shares[part])
    for index, start in enumerate(range(0, count, CHUNK)):
        yield part, min(CHUNK, count - start), seed + index


def assert_all_right(part: str, *kinds: str) -> None:
    """Search the share that a part has of the present profile's graphs: nothing goes wrong, and all kinds are met.

    Where a kind is not, as many graphs again: which are rare depends on the release of hypothesis.
    """
    first = [*chunks(part, PROFILE.max_examples, seed_of_the_day())]
    tally: Counter[str] = Counter()
    for chunk in first:
        tally += search(*chunk)
    if factor() >= 1:
        for chunk in chunks(part, PROFILE.max_examples, seed_of_the_day() + len(first)):
            if all(tally[kind] for kind in kinds):
                break
            tally += search(*chunk)
        assert [kind for kind in kinds if not tally[kind]] == []
        assert tally["unrunnable"] <= 0.05 * tally["graphs"], tally
        assert tally["adapters fused"] >= 0.2 * tally["adapters"], tally


def search(part: str, count: int, seed: int) -> Counter[str]:
    """Draw and check programs; what was met.

    Raises:
        Counterexample: with the program, and how to repeat it.
    """
    tally: Counter[str] = Counter()
    last: list[Any] = []

    def holds(drawn: tuple[Any, ...]) -> None:
        last[:] = drawn
        tally["graphs"] += 1
        try:
            tally.update(check_compiled(*drawn) if part == "compiled" else check(*drawn))
        except Unrunnable as error:
            tally["unrunnable"] += 1
            tally[f"unrunnable: {str(error)[:60]}"] += 1

    if part == "compiled":
        drawn = (programs(), configs(), st.sampled_from(["eager", "aot_eager"]), st.sampled_from([None, True]))
    else:
        kinds = BRANCHING if part == "exported" else QUICK
        drawn = (programs(branches=part == "exported"), st.sampled_from(kinds), configs(), st.sampled_from(AFTERWARDS))
    test = hypothesis.seed(seed)(settings(PROFILE, max_examples=count)(given(st.tuples(*drawn))(holds)))
    try:
        test()
    except Exception as error:
        called = "check_compiled" if part == "compiled" else "check"
        repeat = f"{called}({', '.join(map(repr, last))})"
        raise Counterexample(f"{type(error).__name__}: {error}\nchunk ({part}, {count}, {seed}):\n{repeat}") from error
    return tally
