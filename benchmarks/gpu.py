"""Everything that a GPU host should run, in order of worth, each section a process with a time limit of its own.

What a section measured is on disk as soon as it ends, so a host that is taken away leaves what was done; a section that
fails leaves its last lines in ``gpu.json`` and the next one begins.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import goals
from .results import save

__all__ = ["SECTIONS", "Section", "run"]


@dataclass(frozen=True)
class Section:
    """One command.

    Attributes:
        name: of its JSON, ``gpu-NAME.json``.
        module: run as ``python -m MODULE``.
        arguments: for it.
        minutes: it may take.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    minutes: float

    def command(self, output: Path, *, rehearse: bool) -> list[str]:
        """What is run; a rehearsal is tiny, on the CPU, and leaves out what takes a GPU."""
        arguments = list(self.arguments)
        if rehearse:
            arguments += _REHEARSAL[self.arguments[0]]
        if self.module == "benchmarks":
            arguments += ["--name", f"gpu-{self.name}", "--output", str(output)]
        return [sys.executable, "-m", self.module, *arguments]


_1B = ("--shape", "llama-3.2-1b", "--device", "cuda", "--threads", "8")
_3B = ("--shape", "llama-3.2-3b", "--device", "cuda", "--threads", "8")
_COUNTED = "graph,eager,inductor,eager-profiled,inductor-profiled"
_FEW = ("base", "merged", "PEFT", "fused", "FFBA block (fused)", "FFBA shared (fused)")  # all do not fit into memory
_AXES = ("--ranks", "8,32,128,512", "--batches", "1,8,64", "--depths", "2,8")
_SHORT = ("--new", "32", "--rounds", "30", "--processes", "1")

SECTIONS: tuple[Section, ...] = (
    Section("tests", "pytest", ("-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"), 4),
    Section(
        "decoder-1b-fp16",  # its goals are printed
        "benchmarks",
        (
            *("decoder", *_1B, "--layers", "0", "--dtype", "float16"),
            *("--prompts", "1024", "--new", "32", "--rounds", "16", "--processes", "2"),
        ),
        9.5,
    ),
    Section(
        "generation-1b-fp16",
        "benchmarks",
        (
            *("generation", *_1B, "--layers", "0", "--dtype", "float16"),
            *("--prompts", "1024", "--new", "32", "--rounds", "12", "--processes", "2"),
        ),
        5,
    ),
    Section(
        "latency-1b-bf16",
        "benchmarks",
        ("latency", *_1B, *_SHORT, "--dtype", "bfloat16", "--runners", "eager,reduce-overhead"),
        9,
    ),
    Section(
        "kernels-1b",
        "benchmarks",
        ("kernels", *_1B, "--dtype", "bfloat16", "--layers", "2", "--runners", _COUNTED),
        8,
    ),
    Section("training-1b", "benchmarks", ("training", *_1B, "--dtype", "bfloat16", "--sequence", "512"), 6),
    Section(
        "latency-3b-bf16",
        "benchmarks",
        (
            *("latency", *_3B, *_SHORT, "--dtype", "bfloat16", "--runners", "reduce-overhead"),
            *("--prompts", "128", "--contenders", *_FEW),
        ),
        6,
    ),
    Section(
        "scaling-1b",
        "benchmarks",
        ("scaling", *_1B, "--dtype", "bfloat16", "--layers", "4", *_AXES, "--runner", "reduce-overhead"),
        5,
    ),
)
"""In order of worth. The first one is the GPU-marked tests."""

_TINY = ["--shape", "tiny", "--layers", "0", "--device", "cpu", "--dtype", "float32", "--threads", "1"]
_REHEARSAL = {
    "-q": ["--collect-only"],
    "latency": [
        *_TINY,
        "--runners",
        "eager",
        "--contenders",
        "base",
        "fused",
        "--prompts",
        "8",
        "--new",
        "4",
        "--rounds",
        "2",
    ],
    "decoder": [
        *_TINY,
        "--layers",
        "1",
        "--reference",
        "base",
        "--contenders",
        *("base", "fused", "PEFT (eager)"),
        *("--prompts", "8", "--new", "4", "--rounds", "2", "--processes", "1"),
    ],
    "generation": [
        *(*_TINY, "--layers", "1"),
        *("--prompts", "8", "--new", "4", "--rounds", "2", "--processes", "1", "--swaps", "3"),
    ],
    "kernels": [*_TINY, "--layers", "1", "--runners", "graph"],
    "training": [*_TINY, "--sequence", "8", "--rounds", "2"],
    "scaling": [*_TINY, "--runner", "eager", "--ranks", "2", "--batches", "", "--depths", "", "--rounds", "1"],
}


def run(output: Path, *, minutes: float = 20.0, rehearse: bool = False, sections: Sequence[Section] = SECTIONS) -> int:
    """Run the sections one after the other.

    Args:
        output: folder for the JSON of every section, and for ``gpu.json``, which is written anew after each.
        minutes: in all; a section that would begin later is left out, one that runs longer is cut.
        rehearse: run the same sections tiny and on the CPU, to see that they run.
        sections: what to run.

    Returns:
        exit status: 0 if every section ended well, 1 otherwise.
    """
    started = time.monotonic()
    done: list[dict[str, Any]] = []
    for section in sections:
        left = 60 * minutes - (time.monotonic() - started)
        command = section.command(output, rehearse=rehearse)
        outcome = _run(command, min(left, 60 * section.minutes)) if left > 0 else {"status": "no time left"}
        done.append({"section": section.name, "command": " ".join(["python", *command[1:]]), **outcome})
        print(f"{section.name}: {outcome['status']}, {outcome.get('seconds', 0)} s", flush=True)
        if outcome["status"] not in ("done", "no time left"):
            print(outcome["output"], flush=True)
        elif section.arguments[:1] == ("decoder",) and outcome["status"] == "done":
            for sheet in goals.sheets(json.loads((output / f"gpu-{section.name}.json").read_text())):
                print(sheet.markdown(), flush=True)
        save("gpu", {"sections": done}, output, f"python -m benchmarks gpu --minutes {minutes:g}")
    return int(any(outcome["status"] != "done" for outcome in done))


def _run(command: Sequence[str], seconds: float) -> dict[str, Any]:
    start = time.monotonic()
    try:
        ended = subprocess.run(
            command, timeout=seconds, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        status, output = ("done" if ended.returncode == 0 else f"exit status {ended.returncode}"), ended.stdout
    except subprocess.TimeoutExpired as error:
        status = f"cut after {seconds:.0f} s"
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
    return {"status": status, "seconds": round(time.monotonic() - start), "output": output[-4000:]}
