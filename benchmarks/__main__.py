"""``python -m benchmarks passes|layouts``: measure, print, keep the JSON; ``page``: write docs/benchmarks.md."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import flora_fx

from . import layouts, passes
from .page import write_page

SUITES: dict[str, Any] = {"passes": passes, "layouts": layouts}


def environment(arguments: list[str]) -> dict[str, Any]:
    """What a reader needs to judge a figure or to repeat it."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python -m benchmarks {' '.join(arguments)}".strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flora_fx": flora_fx.__version__,
    }


def main(arguments: list[str]) -> None:
    """Run one suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", choices=[*SUITES, "page"])
    parser.add_argument("--rounds", type=int, help="rounds per variant")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="where the JSON goes")
    chosen = parser.parse_args(arguments)
    if chosen.suite == "page":
        print(f"written to {write_page()}")
        return
    suite = SUITES[chosen.suite]
    result = suite.measure(**({"rounds": chosen.rounds} if chosen.rounds else {}))
    print(suite.table(result))
    chosen.output.mkdir(parents=True, exist_ok=True)
    path = chosen.output / f"{chosen.suite}.json"
    path.write_text(json.dumps({"environment": environment(arguments), **result}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
