"""Results of record: JSON with everything that a reader needs to judge a figure or to repeat it."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["RECORD", "environment", "save"]

RECORD = Path(__file__).parent.parent / "results"
"""Where the JSON of record lies, in a checkout."""

_PACKAGES = ("transformers", "peft", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai-cuda")


def environment(command: str) -> dict[str, Any]:
    """Date, command, machine and versions.

    Args:
        command: what was typed.
    """
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The processor's name; `platform` knows only its architecture."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def save(name: str, result: dict[str, Any], folder: Path, command: str) -> Path:
    """Write ``NAME.json``; it appears when it is whole.

    Args:
        name: of the suite.
        result: what it measured.
        folder: made if missing.
        command: what was typed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({"environment": environment(command), **result}, indent=1) + "\n")
    unfinished.replace(path)
    return path
