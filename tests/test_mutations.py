"""The deliberate bugs of ``make mutations`` are still of the code that there is."""

from __future__ import annotations

from tests.mutations import MUTATIONS, ROOT, SUITE, stale


def test_every_pass_has_mutations_and_each_is_of_text_that_stands_in_its_file_once() -> None:
    assert stale() == []
    tests = {name.split("::")[0] for mutation in MUTATIONS for name in (*SUITE, *mutation.first)}
    assert [name for name in sorted(tests) if not (ROOT / name).exists()] == []
    assert all(mutation.old != mutation.new for mutation in MUTATIONS)
