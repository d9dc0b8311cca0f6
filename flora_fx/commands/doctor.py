"""`flora-fx doctor`: what is installed, what this machine has, and what will be used; to paste into a report."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import flora_fx
from flora_fx.checkout import checkout

__all__ = ["advice", "as_text", "examine"]

PACKAGES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "hf": (("transformers",), ("peft",), ("safetensors",)),
    "onnx": (("onnx",), ("onnxscript",), ("onnxruntime-gpu", "onnxruntime")),
    "genai": (("onnxruntime-genai-cuda", "onnxruntime-genai"),),
    "cli": (("typer",), ("rich",), ("matplotlib",)),
}
"""What is looked for, by the extra that brings it. Packages of one module stand together: one of them is enough."""

_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "CXX", "FLORA_FX_DUMP", "FLORA_FX_LEAVE_OUT", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"),
    *("TORCHINDUCTOR_FREEZING", "TORCH_COMPILE_DISABLE", "TORCH_LOGS"),
)
"""Of the environment: those that change what happens."""

_UNKNOWN, _ABSENT = "not known", "is not there"


def examine() -> dict[str, Any]:
    """Look at everything. What is missing or broken is told like the rest: this raises nothing.

    Returns:
        ``versions``, ``machine``, ``used`` and ``environment``, each a value by name, and ``advice``, a list.
    """
    found: dict[str, Any] = {
        "versions": {
            "flora-fx": f"{flora_fx.__version__}{' (a checkout)' if checkout() else ''}",
            "python": platform.python_version(),
            "torch": _version("torch") or "not installed",
            **{name: told for extra, all_of in PACKAGES.items() for name, told in _versions(extra, all_of)},
        },
        "machine": {
            "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
            "cores": str(os.cpu_count()),
            "GPUs of torch": _tried(_gpus),
            "ONNX Runtime has": _tried(_providers),
        },
        "used": {
            "an export runs on": _tried(_provider),
            'backend="flora"': _backend(),
            "Inductor's compiler": _compiler(),
        },
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    return {**found, "advice": advice(found)}


def as_text(found: Mapping[str, Any]) -> str:
    """Plain lines, one a value.

    Args:
        found: by `examine`.

    >>> print(as_text({"versions": {"torch": "2.13.0"}, "environment": {}, "advice": ["update it"]}))
    versions
      torch                  2.13.0
    environment
      (nothing)
    advice
      update it
    """
    lines = []
    for title, values in found.items():
        rows = [f"{name:<22} {value}" for name, value in values.items()] if isinstance(values, Mapping) else values
        lines += [title, *(f"  {row}" for row in rows or ["(nothing)"])]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _versions(extra: str, all_of: tuple[tuple[str, ...], ...]) -> Iterator[tuple[str, str]]:
    """Of each module the packages that are there, or the first that may be."""
    for one_of in all_of:
        there = [(name, _version(name)) for name in one_of if _version(name)]
        yield from there or [(one_of[0], f"not installed: pip install 'flora-fx[{extra}]'")]


def _tried(look: Callable[[], str]) -> str:
    """What is found, or why nothing is: a package that is broken may raise anything."""
    try:
        return look()
    except Exception as error:
        return f"{_UNKNOWN}: {' '.join(str(error).split()) or type(error).__name__}"


def _gpus() -> str:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return f"none ({built})"
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    named = [f"{card.name} ({card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor})" for card in cards]
    return f"{', '.join(named)}, CUDA {torch.version.cuda}"


def _providers() -> str:
    return ", ".join(importlib.import_module("onnxruntime").get_available_providers())


def _provider() -> str:
    session = importlib.import_module("flora_fx.export.run.session")
    return str(session.provider_name(session.usable_providers()[0]))


def _backend() -> str:
    known = any(point.name == "flora" for point in entry_points(group="torch_dynamo_backends"))
    return (
        "found by its name" if known else "not found by its name: pip install, or pass backend=flora_fx.backend.flora"
    )


def _compiler() -> str:
    wanted = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return shutil.which(wanted) or f"{wanted} {_ABSENT}"


def advice(found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What would mend what is amiss, a sentence each.

    Args:
        found: by `examine`.
    """
    told = [
        f"{' and '.join(one_of)} overwrite each other: uninstall both, then install one of them"
        for all_of in PACKAGES.values()
        for one_of in all_of
        if len([name for name in one_of if name in found["versions"]]) > 1
    ]
    on_cpu = found["used"]["an export runs on"] == "CPUExecutionProvider"
    if on_cpu and not found["machine"]["GPUs of torch"].startswith(("none", _UNKNOWN)):
        told.append("torch has a GPU and exports run on the CPU: install onnxruntime-gpu, and no onnxruntime beside it")
    if found["used"]["Inductor's compiler"].endswith(_ABSENT):
        told.append("torch.compile on a CPU needs a C++ compiler: install one, or name it in CXX")
    return told
