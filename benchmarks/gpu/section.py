"""A section of a phase: what it does, how long it may, and how it is run in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .folder import Folder
    from .plan import Plan

__all__ = ["Running", "Section"]

_OUTPUT_KEPT = 4000  # characters


@dataclass(frozen=True)
class Section:
    """One part of a phase.

    Attributes:
        name: unique in its phase.
        work: gives results, each with all that is known so far; each is kept at once.
        seconds: it may take.
        needs_provider: of ONNX Runtime, for the device: it cannot run before that is installed.
        record: of the JSON file of record, without ``gpu-``; empty for a section that has none.
    """

    name: str
    work: Callable[[Plan, Folder], Iterator[dict[str, Any]]]
    seconds: float
    needs_provider: bool = False
    record: str = ""


@dataclass
class Running:
    """A command in a process group of its own, with a limit.

    Attributes:
        command: what runs.
        seconds: it may take.
        log: of what it prints.
        environment: beside this process's.
    """

    command: Sequence[str]
    seconds: float
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._output: IO[bytes] = self.log.open("wb")
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.environment},
            process_group=0,  # not a session: who ends this process's session ends these too
        )

    def ended(self) -> dict[str, Any] | None:
        """``status`` (``done``, ``exit status …`` or ``cut after …``), ``seconds``, ``output``; None while it runs."""
        taken = time.monotonic() - self._started
        code = self._process.poll()
        if code is None and taken < self.seconds:
            return None
        status = f"cut after {taken:.0f} s" if code is None else "done" if code == 0 else f"exit status {code}"
        self.stop()
        output = self.log.read_bytes().decode(errors="replace")
        return {"status": status, "seconds": round(taken, 1), "output": output[-_OUTPUT_KEPT:]}

    def stop(self) -> None:
        """End it and all that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._output.close()


def command(phase: str, section: Section, folder: Path, *, rehearse: bool) -> list[str]:
    """What runs a section, in a checkout or from an installation."""
    assert __package__
    return [sys.executable, "-m", __package__, phase, section.name, str(folder), *(["rehearse"] if rehearse else [])]
