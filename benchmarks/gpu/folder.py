"""What the two phases leave in a folder, for each other and for the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..show.results import save
from .plan import Plan
from .section import Section

__all__ = ["Folder"]


@dataclass(frozen=True)
class Folder:
    """The folder of one checkout's phases.

    Attributes:
        path: of it; made when something is kept.
    """

    path: Path

    @property
    def references(self) -> Path:
        """What `kept.once` computed."""
        return self.path / "references"

    @property
    def compiled(self) -> Path:
        """Inductor's cache."""
        return self.path / "inductor"

    @property
    def record(self) -> Path:
        """JSON files, as `benchmarks/results/` has them."""
        return self.path / "record"

    def graph(self, name: str) -> Path:
        """Folder for one export, alone: exporters leave other files beside it."""
        return self.path / "graphs" / _slug(name)

    def keep(self, phase: str, section: Section, result: dict[str, Any]) -> None:
        """Write what a section found so far, for the other phase, and for the record if it is a section of one."""
        save(_slug(section.name), result, self.path / phase, f"python -m benchmarks gpu {phase}")
        if section.record:
            save(f"gpu-{section.record}", result, self.record, f"python -m benchmarks gpu {phase}")

    def forget(self, phase: str, section: Section) -> None:
        """Remove what a section found in an earlier run."""
        (self.path / phase / f"{_slug(section.name)}.json").unlink(missing_ok=True)

    def found(self, phase: str, section_name: str) -> dict[str, Any] | None:
        """What a section kept last; None if nothing."""
        file = self.path / phase / f"{_slug(section_name)}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def log(self, phase: str, section: Section) -> Path:
        """What a section prints."""
        return self.path / phase / f"{_slug(section.name)}.log"

    def outcomes(self, phase: str, asked: Plan) -> dict[str, dict[str, Any]]:
        """How the sections of a phase ended, by name; none, if another plan was asked."""
        file = self.record / f"gpu-{phase}.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        return kept["sections"] if kept.get("plan") == repr(asked) else {}

    def keep_outcomes(self, phase: str, asked: Plan, outcomes: Mapping[str, Mapping[str, Any]]) -> None:
        """Write how the sections of a phase ended so far."""
        whole = {"plan": repr(asked), "sections": dict(outcomes)}
        save(f"gpu-{phase}", whole, self.record, f"python -m benchmarks gpu {phase}")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other phase runs in this folder, and hold others off."""
        import fcntl  # Windows has none

        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _slug(name: str) -> str:
    """A file's name.

    >>> _slug("export FFBA block (fused)")
    'export-ffba-block-fused'
    """
    return re.sub(r"\W+", "-", name).strip("-").lower()
