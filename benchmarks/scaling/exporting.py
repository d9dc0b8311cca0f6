"""Time and memory of an export, beside the model builder of onnxruntime-genai: whole commands, from a checkpoint.

Both read the same folder of safetensors and the same adapter, each in a process of its own; they take turns, and only
what was measured in one turn is compared. Ours runs its result and compares it with PyTorch, the builder does not. Its
time is told by stage and, of what it imports, by package.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flora_fx.errors import ExportError

from ..contenders.models import make_model
from ..contenders.onnx_exports import builder_command, write_checkpoint
from ..contenders.settings import Settings
from ..measure.isolated import Progress, isolated
from ..show.sheet import Sheet

__all__ = ["EXPORTERS", "measure", "sheets"]

EXPORTERS = ("flora_fx", "genai builder")

_KEPT = 2000  # characters of what a failed exporter printed
_TOLD = 0.05
"""Packages whose imports take so many seconds are told one by one."""
_IMPORT = re.compile(r"^import time: +(\d+) \| +\d+ \| +(\w+)", re.MULTILINE)


def measure(
    settings: Settings,
    *,
    depths: Sequence[int] = (),
    rounds: int = 3,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Export the model with its LoRA at several depths, by both.

    Args:
        settings: of the model; its depth is one of several.
        depths: in layers; a third of the model's, and all of it, if none is given.
        rounds: exports by each, at each depth.
        progress: called with the rounds done and in all.

    Returns:
        ``{"settings", "export": {"rounds", "rows", "imports"}}``. A row has ``exporter``, ``layers``, and, one number a
        round, ``seconds``, ``cpu_seconds`` (of all threads) and ``peak_bytes`` of the process; ours also has ``stages``
        (seconds by name, of the fastest round) and ``peaks`` (bytes by the end of each). Imports are seconds by
        package, of one more export of ours at the last depth under ``python -X importtime``.

    Raises:
        ExportError: an exporter failed.
    """
    depths = depths or tuple(dict.fromkeys((max(settings.depth // 3, 1), settings.depth)))
    rows: list[dict[str, Any]] = []
    imports: dict[str, float] = {}
    turns = random.Random(0)
    for number, depth in enumerate(depths):
        with tempfile.TemporaryDirectory(prefix="flora-export-") as place:
            deep = replace(settings, layers=depth)
            checkpoint, adapter = isolated(_write, deep, Path(place), threads=settings.threads, progress=_quiet)
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in EXPORTERS}
            for done in range(rounds):
                for name in turns.sample(EXPORTERS, len(EXPORTERS)):
                    output = Path(place, "out", f"{EXPORTERS.index(name)}-{done}")
                    found[name].append(_run(name, settings, checkpoint, adapter, output))
                progress(number * rounds + done + 1, len(depths) * rounds)
            if number == len(depths) - 1:
                output = Path(place, "out", "imports")
                told = _run(EXPORTERS[0], settings, checkpoint, adapter, output, "-X", "importtime")
                imports = told["imports"]
        rows += [{"exporter": name, "layers": depth, **_together(exports)} for name, exports in found.items()]
    export = {"rounds": rounds, "rows": rows, "imports": imports}
    return {"settings": asdict(settings) | {"layers": settings.depth}, "export": export}


def _write(settings: Settings, place: Path, progress: Progress) -> tuple[Path, Path]:
    """In a process of its own: what this one once held would be counted as the exporters', which it starts."""
    checkpoint, adapter = write_checkpoint(make_model(settings, "peft"), place)
    assert adapter is not None
    return checkpoint, adapter


def _quiet(done: int, total: int) -> None:
    """A checkpoint is written in one step."""


def _together(exports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    lists = {key: [export[key] for export in exports] for key in ("seconds", "cpu_seconds", "peak_bytes")}
    fastest = min(exports, key=lambda export: float(export["seconds"]))
    return {**lists, "stages": fastest["stages"], "peaks": fastest["peaks"]}


def _run(name: str, settings: Settings, checkpoint: Path, adapter: Path, output: Path, *python: str) -> dict[str, Any]:
    """One export; ``python`` are options of the interpreter, for ours."""
    output.parent.mkdir(exist_ok=True)
    if name == "flora_fx":
        places = ["-m", str(checkpoint), "-a", str(adapter), "-o", str(output)]
        export = ["-m", "flora_fx.cli", "export", *places, "--dtype", settings.dtype, "--json"]
        command = [sys.executable, *python, *export]
    else:
        command = builder_command(settings, checkpoint, adapter, output)
    threads = str(settings.threads)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"}
    if settings.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=log, env=environment, cwd=_ROOT)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        log.seek(0)
        printed, errors = out.read(), log.read()
    if process.returncode:
        raise ExportError(f"{name} ended with {process.returncode}: {(printed + errors)[-_KEPT:]}")
    told = json.loads(printed) if name == "flora_fx" else {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * unit,
        "stages": told.get("seconds", {}),
        "peaks": told.get("peak_bytes", {}),
        "imports": _imports(errors),
    }


def _imports(log: str) -> dict[str, float]:
    """Seconds by package, of what ``-X importtime`` has told; the slowest first.

    >>> _imports("import time:  100000 |  300000 | sympy\\nimport time:  200000 |  200000 |   sympy.core\\n")
    {'sympy': 0.3}
    """
    microseconds: Counter[str] = Counter()
    for time_of_its_own, package in _IMPORT.findall(log):
        microseconds[package] += int(time_of_its_own)
    return {package: number / 1e6 for package, number in microseconds.most_common()}


_ROOT = Path(__file__).parents[2]
"""Where a checkout finds its own packages; anywhere will do for what is installed."""


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """Both exporters by depth, and the stages of ours."""
    found = result["export"]
    rows = found["rows"]
    of = {(row["exporter"], row["layers"]): row for row in rows}
    body, stages = [], []
    for row in rows:
        peer = of[EXPORTERS[1], row["layers"]]
        body.append(
            [
                row["exporter"],
                str(row["layers"]),
                f"{statistics.median(row['seconds']):.1f}",
                f"{statistics.median(row['cpu_seconds']):.1f}",
                f"{max(row['peak_bytes']) / 2**20:.0f}",
                f"{_ratio(row, peer, 'seconds'):.2f}",
                f"{_ratio(row, peer, 'cpu_seconds'):.2f}",
                f"{_ratio(row, peer, 'peak_bytes'):.2f}",
            ]
        )
        stages += [
            [name, str(row["layers"]), f"{seconds:.2f}", f"{row['peaks'][name] / 2**20:.0f}"]
            for name, seconds in row["stages"].items()
        ]
        if row["stages"]:
            rest = min(row["seconds"]) - sum(row["stages"].values())
            peak = max(row["peak_bytes"]) / 2**20
            stages.append(["start and end", str(row["layers"]), f"{rest:.2f}", f"{peak:.0f}"])
    header = ["exporter", "layers", "seconds", "CPU seconds", "peak MiB"]
    header += ["seconds, to the builder's", "CPU", "peak"]
    notes = [
        f"Medians of {found['rounds']} exports, and of the ratios within a round; peaks are the highest. Ours loads "
        "the graph in ONNX Runtime and compares it with PyTorch, which the builder does not.",
        *_slopes(rows),
    ]
    return [
        Sheet("An export from a checkpoint and a LoRA, by command", header, body, notes),
        Sheet(
            "Stages of ours",
            ["stage", "layers", "seconds", "peak MiB by then"],
            stages,
            [
                "Of the fastest round. `load` imports transformers and PEFT and reads the checkpoint; the others are "
                "`export_onnx`. Start and end: Python, torch's import, and what is still on its way to the disk.",
            ],
        ),
        *_import_sheets(found.get("imports", {})),
    ]


def _import_sheets(imports: Mapping[str, float]) -> list[Sheet]:
    """Imports by package, where they were measured."""
    if not imports:
        return []
    told = {package: seconds for package, seconds in imports.items() if seconds >= _TOLD}
    rest = sum(imports.values()) - sum(told.values())
    rows = [[package, f"{seconds:.2f}"] for package, seconds in [*told.items(), ("all others", rest)]]
    note = "Of one more export at the last depth, under `python -X importtime`, which makes imports slower itself."
    return [Sheet("Imports of ours, by package", ["package", "seconds"], rows, [note])]


def _ratio(row: Mapping[str, Any], peer: Mapping[str, Any], key: str) -> float:
    return statistics.median(own / other for own, other in zip(row[key], peer[key], strict=True))


def _slopes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What one more layer costs each, where there are two depths."""
    said = []
    for name in EXPORTERS:
        by_depth = sorted((row["layers"], statistics.median(row["seconds"])) for row in rows if row["exporter"] == name)
        (few, low), (many, high) = by_depth[0], by_depth[-1]
        if many > few:
            said.append(f"{name} {1e3 * (high - low) / (many - few):.0f} ms")
    return [f"One more layer: {', '.join(said)}."] if said else []
