"""What is known to differ under some releases: strict xfails, each with a reason. tests/conftest.py applies them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from packaging.requirements import Requirement

__all__ = ["DIFFERENCES", "Difference", "expect"]

TESTS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Difference:
    """Tests that fail under some releases.

    Attributes:
        tests: a pattern of their ids, from ``tests/`` on (``[[]`` is a bracket).
        releases: under which they fail, all of them together: ``"torch<2.12"``.
        reason: why they do.
    """

    tests: str
    releases: tuple[str, ...]
    reason: str

    def holds(self, version: Callable[[str], str] = importlib.metadata.version) -> bool:
        """Whether those are installed; ``2.11.0+cu130`` is 2.11.0.

        Args:
            version: of a package.

        >>> difference = Difference("tests/test_a.py::test_b", ("torch<2.12",), "")
        >>> difference.holds(lambda package: "2.11.0+cu130"), difference.holds(lambda package: "2.12.0")
        (True, False)
        """
        try:
            return all(
                one.specifier.contains(version(one.name), prereleases=True) for one in map(Requirement, self.releases)
            )
        except importlib.metadata.PackageNotFoundError:
            return False


DIFFERENCES = (
    Difference(
        "tests/training/test_backend_numbers.py::test_inductor_trains_a_transformer",
        ("torch<2.12",),
        "Inductor computes attention's backward in float64 from sums in float32 and fails, with or without adapters",
    ),
    *(
        Difference(
            f"tests/training/test_symbolic_scales.py::{test}[[]alpha by rank]",
            ("torch<2.12",),
            "Dynamo takes a quotient of two floats for a constant and compiles again for each value, with or without "
            "adapters",
        )
        for test in ("test_a_symbolic_scale_fuses_as_a_constant_does", "test_gradients_under_a_symbolic_scale")
    ),
    Difference(
        "tests/ecosystem/test_tensor_subclasses.py::test_one_weight_is_a_subclass[[]plain-*]",
        ("torch<2.12",),
        "AOTAutograd compiles no model with a weight that is a subclass without `__torch_dispatch__`, with or without "
        "adapters",
    ),
    *(
        Difference(
            f"tests/cli/test_inspect.py::{test}",
            ("peft<0.21.2", "transformers>=5.23"),
            "PEFT wraps no T5 for SEQ_2_SEQ_LM: it asks for a method that these releases of transformers do not have",
        )
        for test in ("test_inspect_encoder_decoder", "test_inspect_with_inputs_from_a_file")
    ),
    Difference(
        "tests/export/trace/test_decoder_refusals.py::test_what_group_query_attention_cannot_do[[]GPT-J]",
        ("transformers>=5.24",),
        "GPT-J's attention is behind transformers' AttentionInterface from 5.24 on, so it is not refused",
    ),
    Difference(
        "tests/ffba/test_peft_lifecycle.py::test_transformers_own_methods",
        ("transformers>=5.24", "peft<0.22"),
        "`model.add_adapter` of transformers asks for peft 0.22, which pip did not find",
    ),
)


def expect(items: Iterable[pytest.Item], differences: Iterable[Difference]) -> None:
    """Mark the tests that must fail under the releases that are installed.

    Args:
        items: the tests that were collected.
        differences: those known.
    """
    known = [difference for difference in differences if difference.holds()]
    for item in items:
        if item.path.is_relative_to(TESTS):
            name = f"tests/{item.path.relative_to(TESTS).as_posix()}::{item.nodeid.partition('::')[2]}"
            for difference in known:
                if fnmatchcase(name, difference.tests):
                    item.add_marker(pytest.mark.xfail(reason=difference.reason, strict=True))
