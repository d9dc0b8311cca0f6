"""A phase: its sections, one after the other or side by side, each in a process, until the time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flora_fx.errors import MissingExtraError, require

from .folder import Folder
from .plan import Plan, plan
from .section import Running, Section, command

__all__ = ["Phase", "provider_missing"]

_WAITS = "waits for ONNX Runtime's CUDA provider"
_LATE = "no time left"
_PAUSE = 0.1  # seconds between looks at what runs


@dataclass(frozen=True)
class Phase:
    """What one command does.

    Attributes:
        name: of the command.
        sections: of a plan, in order of worth.
        minutes: it may take, by default.
        side_by_side: as many at once as the plan says.
        resumes: leaves out what an earlier run has done or seen fail.
        finish: makes something of all that was found.
    """

    name: str
    sections: Callable[[Plan], Sequence[Section]]
    minutes: float
    side_by_side: bool = False
    resumes: bool = False
    finish: Callable[[Plan, Folder], None] = field(default=lambda asked, place: None)

    def threads(self, asked: Plan) -> int:
        """CPU threads of a section."""
        return _share(asked) if self.side_by_side else asked.onnx.threads

    def run(self, path: Path, *, minutes: float | None = None, rehearse: bool = False, only: Sequence[str] = ()) -> int:
        """Run the sections; print how each ended, and keep that, and what they found, in the folder.

        Args:
            path: of the folder.
            minutes: in all; a section that would begin later is left out, one that runs longer is cut.
            rehearse: tiny and on the CPU.
            only: names of sections; empty for all.

        Returns:
            exit status: 0 if all ended well or wait for a provider that is not installed yet.

        Raises:
            ValueError: there is no GPU, and it is no rehearsal; an unknown section.
        """
        asked, place = plan(rehearse=rehearse), Folder(path.absolute())
        sections = self.sections(asked)
        names = [section.name for section in sections]
        for name in only:
            if name not in names:
                raise ValueError(f"unknown section {name!r}; it must be one of {', '.join(names)}")
        with place.alone():
            allowed = self.minutes * asked.patience if minutes is None else minutes
            turn = _Turn(self, asked, place, rehearse, time.monotonic() + 60 * allowed)
            turn.go([section for section in sections if section.name in only or not only])
            self.finish(asked, place)
        return int(any(outcome["status"] not in ("done", _WAITS) for outcome in turn.outcomes.values()))


@dataclass
class _Turn:
    """One run of a phase.

    Attributes:
        phase: it.
        asked: the plan.
        place: the folder.
        rehearse: whether it is a rehearsal.
        until: when it ends, of `time.monotonic`.
        outcomes: by section, how it ended in this run, or in one before it that asked the same.
    """

    phase: Phase
    asked: Plan
    place: Folder
    rehearse: bool
    until: float
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def go(self, sections: Sequence[Section]) -> None:
        """Run those that are not over, as many at once as the phase allows."""
        earlier = self.place.outcomes(self.phase.name, self.asked)
        todo = [section for section in sections if not self._over(earlier.get(section.name))]
        self.outcomes = {name: earlier[name] for name in earlier.keys() - {section.name for section in todo}}
        waiting: list[Section] = []
        missing = provider_missing(self.asked.device)
        for section in todo:
            if missing and section.needs_provider:
                self._ended(section.name, {"status": _WAITS})
            else:
                waiting.append(section)
        running: dict[str, Running] = {}
        try:
            while waiting or running:
                while waiting and len(running) < (self.asked.beside if self.phase.side_by_side else 1):
                    self._start(waiting.pop(0), running)
                for name, process in [*running.items()]:
                    if (outcome := process.ended()) is not None:
                        del running[name]
                        self._ended(name, outcome)
                if running:
                    time.sleep(_PAUSE)
        finally:
            for process in running.values():
                process.stop()

    def _over(self, outcome: dict[str, Any] | None) -> bool:
        """Whether a section need not be run again: it is done, or would fail as it did."""
        return self.phase.resumes and outcome is not None and outcome["status"].startswith(("done", "exit status"))

    def _start(self, section: Section, running: dict[str, Running]) -> None:
        left = self.until - time.monotonic()
        if left <= 0:
            self._ended(section.name, {"status": _LATE})
            return
        self.place.forget(self.phase.name, section)
        running[section.name] = Running(
            command(self.phase.name, section, self.place.path, rehearse=self.rehearse),
            min(left, section.seconds * self.asked.patience),
            self.place.log(self.phase.name, section),
            self._environment(),
        )

    def _ended(self, name: str, outcome: dict[str, Any]) -> None:
        self.outcomes[name] = outcome
        self.place.keep_outcomes(self.phase.name, self.asked, self.outcomes)
        print(f"{name}: {outcome['status']}, {outcome.get('seconds', 0):.0f} s", flush=True)
        if outcome.get("output") and outcome["status"] != "done":
            print(outcome["output"], flush=True)

    def _environment(self) -> dict[str, str]:
        """One cache for both phases; and each section only its share of the cores."""
        return {
            "TORCHINDUCTOR_CACHE_DIR": str(self.place.compiled),
            "TORCHINDUCTOR_COMPILE_THREADS": str(_share(self.asked)),
            "OMP_NUM_THREADS": str(self.phase.threads(self.asked)),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }


def _share(asked: Plan) -> int:
    """CPU threads of one of several sections."""
    return max(1, asked.onnx.threads // 4)


def provider_missing(device: str) -> bool:
    """Whether ONNX Runtime lacks the library of the provider for a device; its wheels list it in any case."""
    if device == "cpu":
        return False
    try:
        package = Path(str(require("onnxruntime", "onnx").__file__)).parent
    except MissingExtraError:
        return True
    return not any((package / "capi").glob("*onnxruntime_providers_cuda.*"))
