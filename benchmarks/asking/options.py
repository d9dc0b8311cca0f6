"""Options that suites share, and how their values are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from ..contenders.settings import DTYPES, PROJECTIONS, SHAPES, Settings
from ..show.results import RECORD

__all__ = [
    "Options",
    "add_contenders",
    "add_model",
    "add_output",
    "add_passes",
    "add_prompt",
    "add_rounds",
    "at_least",
    "compared",
    "known",
    "names",
    "numbers",
    "settings",
    "some_names",
    "some_numbers",
]

Options = argparse.Namespace
Number = TypeVar("Number", int, float)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where files go."""
    parser.add_argument("--output", type=Path, default=RECORD, help="folder for JSON and pictures (%(default)s)")
    parser.add_argument("--name", help="of the JSON file; the suite's by default")


def add_model(
    parser: argparse.ArgumentParser, *, layers: int = 0, shape: str = "smollm-135m", dtype: str = "float32"
) -> None:
    """Where files go, and what `settings` reads.

    Args:
        parser: of a suite.
        layers, shape, dtype: by default.
    """
    add_output(parser)
    parser.add_argument("--shape", default=shape, help=f"one of {', '.join(SHAPES)} (%(default)s)")
    parser.add_argument(
        "--layers", type=int, default=layers, help="cut to so many decoder layers (%(default)s; 0: all)"
    )
    parser.add_argument("--dtype", default=dtype, help=f"one of {', '.join(DTYPES)} (%(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA (%(default)s)")
    parser.add_argument("--targets", type=names, default=PROJECTIONS, help="adapted projections, with commas (all)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads and cores (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")


def settings(options: Options) -> Settings:
    """The model, the adapter and the device that options of `add_model` ask for.

    Raises:
        ValueError: an option makes no sense.
    """
    return Settings(
        **{name: getattr(options, name) for name in ("shape", "layers", "dtype", "rank", "batch", "threads", "device")},
        targets=tuple(options.targets),
    )


def add_prompt(parser: argparse.ArgumentParser, length: int = 128) -> None:
    """The length of a prompt.

    Args:
        parser: of a suite.
        length: by default.
    """
    parser.add_argument("--prompts", type=some_numbers, default=[length], help=f"prompt length ({length})")


def add_rounds(parser: argparse.ArgumentParser, rounds: int, of: str) -> None:
    """How often something is measured.

    Args:
        parser: of a suite.
        rounds: by default.
        of: what they are.
    """
    parser.add_argument("--rounds", type=at_least(1, int), default=rounds, help=f"{of} (%(default)s)")


def add_passes(parser: argparse.ArgumentParser, *, prompts: list[int], new: int, rounds: int, processes: int) -> None:
    """What is generated, and how often.

    Args:
        parser: of a suite.
        prompts, new, rounds, processes: by default.
    """
    lengths = ",".join(map(str, prompts))
    few = at_least(1, int)
    parser.add_argument("--prompts", type=some_numbers, default=prompts, help=f"prompt lengths ({lengths})")
    parser.add_argument("--new", type=few, default=new, help="tokens after the prompt (%(default)s)")
    add_rounds(parser, rounds, "generations by each contender")
    parser.add_argument("--processes", type=few, default=processes, help="spread over so many processes (%(default)s)")


def add_contenders(parser: argparse.ArgumentParser) -> None:
    """Who takes part."""
    parser.add_argument(
        "--contenders", nargs="+", default=(), metavar="NAME", help="only these, the reference among them"
    )


def at_least(least: Number, number: Callable[[str], Number]) -> Callable[[str], Number]:
    """How a number that may not be small is read.

    Args:
        least: that it may be.
        number: reads it.
    """

    def checked(text: str) -> Number:
        value = number(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"it is {value}, and must be at least {least}")
        return value

    checked.__name__ = getattr(number, "__name__", "number")  # which argparse shows
    return checked


def names(text: str) -> list[str]:
    """Names with commas between them; there may be none.

    >>> names("q_proj, v_proj")
    ['q_proj', 'v_proj']
    """
    return [name.strip() for name in text.split(",") if name.strip()]


def some_names(text: str) -> list[str]:
    """Names with commas between them."""
    return _some(names(text))


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between them; there may be none."""
    return [int(number) for number in names(text)]


def some_numbers(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return _some(numbers(text))


Value = TypeVar("Value")


def _some(values: list[Value]) -> list[Value]:
    if not values:
        raise argparse.ArgumentTypeError("it names none")
    return values


def known(kind: str, asked: Iterable[str], names: Collection[str]) -> None:
    """Refuse a name that nothing has.

    Args:
        kind: of what it names.
        asked: the names.
        names: those that there are.

    Raises:
        ValueError: one of them is unknown.
    """
    for name in asked:
        if name not in names:
            raise ValueError(f"unknown {kind} {name!r}; it must be one of {', '.join(names)}")


def compared(contenders: Sequence[str], reference: str, names: Collection[str]) -> None:
    """Refuse contenders that cannot be compared.

    Args:
        contenders: what was typed; none for all.
        reference: what ratios are taken to.
        names: of all that there are.

    Raises:
        ValueError: a name is unknown, or the reference is not among them.
    """
    known("contender", (*contenders, reference), names)
    if contenders and reference not in contenders:
        raise ValueError(f"--contenders must have {reference} among them: ratios are taken to it")
