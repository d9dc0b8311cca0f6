"""The graphs that ONNX Runtime is measured with: this project's exports and its peers'.

A process per model makes them, so that what exporters print, patch in torch and leave in memory stays out of
the one that measures, and a peer that fails takes nothing with it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flora_fx.errors import ExportError, FloraError, require
from flora_fx.export import export_onnx
from flora_fx.export.trace.model import unwrap

from ..measure.isolated import Progress, isolated
from .models import PLACEMENTS, Adapted, make_model
from .settings import Settings

__all__ = [
    "GRAPHS",
    "PREFILL",
    "PROVIDERS",
    "builder_command",
    "count_nodes",
    "decode_graph",
    "write_checkpoint",
    "write_graph",
    "write_graphs",
]

PREFILL = "prefill.onnx"
"""In a folder where decode is a graph of its own, too."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""ONNX Runtime's execution provider, by device."""

_Writer = Callable[[Settings, Any, list[Path]], Iterator[None]]
"""Fills a folder per contender and yields after each."""

_OUTPUT_KEPT = 4000  # characters of what a failed exporter printed


def write_graphs(
    settings: Settings,
    directory: Path,
    progress: Progress = lambda done, total: None,
    *,
    names: Sequence[str] = (),
) -> dict[str, Path | str]:
    """Export the model in all forms.

    Args:
        settings: of the model; its device is the one that the graphs are for.
        directory: gets a folder per graph; missing parents are made.
        progress: called with the graphs done and in all.
        names: of `GRAPHS`, to write only these; empty for all.

    Returns:
        by name: the folder, or why there is none (the error in one line, then the end of what the exporters printed).
    """
    directory.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in GRAPHS if not names or name in names]
    graphs: dict[str, Path | str] = {}
    for adapted, writers in _WRITERS.items():
        mine = [name for written in writers for name in written if name in wanted]
        if not mine:
            continue
        tick = partial(_after, progress, len(graphs), len(wanted))
        graphs |= _write_elsewhere(settings, adapted, directory, mine, tick)
    return {name: graphs[name] for name in wanted}


def write_graph(settings: Settings, name: str, directory: Path) -> Path:
    """Export one of `GRAPHS` in this process, and print what its exporter prints.

    Args:
        settings: of the model; its device is the one that the graph is for.
        name: of the graph.
        directory: gets a folder for it, and perhaps one for a graph that its exporter cannot leave out; missing
            parents are made.

    Returns:
        the folder.

    Raises:
        Exception: of all kinds; exporters do.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    directory.mkdir(parents=True, exist_ok=True)
    adapted = GRAPHS[name]
    [(names, writer)] = [(names, writer) for names, writer in _WRITERS[adapted].items() if name in names]
    folders = [_folder(directory, each) for each in names]
    model = make_model(settings, adapted).cpu()
    if settings.device == "cuda":
        torch.cuda.empty_cache()
    for each, _ in zip(names, writer(settings, model, folders), strict=False):
        if each == name:
            break
    return folders[names.index(name)]


def decode_graph(directory: Path) -> Path:
    """The file of the graph that decodes, in a folder of `write_graphs`."""
    return directory / ("decode.onnx" if (directory / PREFILL).exists() else "model.onnx")


def count_nodes(directory: Path) -> dict[str, int]:
    """How many nodes of each operator the decode graph has, as it was written (ONNX Runtime may fuse some more).

    Args:
        directory: a folder of `write_graphs`.

    Raises:
        MissingExtraError: onnx is not installed.
    """
    graph = require("onnx", "onnx").load(decode_graph(directory), load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node).most_common())


def _after(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _write_elsewhere(
    settings: Settings, adapted: Adapted, directory: Path, names: Sequence[str], tick: Progress
) -> dict[str, Path | str]:
    """What `_write_model` wrote, even if its process died on the way."""
    file = _outcomes(directory, adapted)
    file.unlink(missing_ok=True)
    died = ""
    try:
        isolated(_write_model, settings, adapted, directory, names, threads=os.cpu_count() or 1, progress=tick)
    except RuntimeError as error:
        died = f"{str(error).splitlines()[-1]}\n{_printed(_log(directory, adapted))}".strip()
    outcomes = json.loads(file.read_text()) if file.exists() else {}
    errors = {name: outcomes.get(name, died) for name in names}
    return {name: _folder(directory, name) if error is None else error for name, error in errors.items()}


def _folder(directory: Path, name: str) -> Path:
    return directory / re.sub(r"\W+", "-", name).strip("-").lower()


def _write_model(settings: Settings, adapted: Adapted, directory: Path, names: Sequence[str], tick: Progress) -> None:
    """Write the graphs of one model in a process of its own; each outcome (None or an error) is kept at once."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # transformers is not imported yet
    with _log(directory, adapted).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    # On the CPU, where exporters are at home, with the weights that the device's random numbers give.
    model = make_model(settings, adapted).cpu()
    outcomes: dict[str, str | None] = {}
    for written, writer in _WRITERS[adapted].items():
        if set(written).isdisjoint(names):
            continue
        for name, error in _attempt(writer, settings, model, directory, written, _log(directory, adapted)):
            outcomes[name] = error
            _outcomes(directory, adapted).write_text(json.dumps(outcomes))
            tick(sum(name in outcomes for name in names), len(names))


def _attempt(
    writer: _Writer, settings: Settings, model: Any, directory: Path, names: Sequence[str], log: Path
) -> Iterator[tuple[str, str | None]]:
    """Each name with None once it is written, or with the error that prevented it and what was printed to the log."""
    waiting = list(names)
    start = log.stat().st_size
    try:
        for _ in writer(settings, model, [_folder(directory, name) for name in names]):
            yield waiting.pop(0), None
    except Exception as error:  # exporters raise errors of all kinds
        if not isinstance(error, FloraError):  # those say enough
            traceback.print_exc()
        sys.stdout.flush()
        reason = f"{' '.join(str(error).split()) or type(error).__name__}\n{_printed(log, start)}".strip()
        yield from ((name, reason) for name in waiting)


def _printed(log: Path, start: int = 0) -> str:
    return log.read_bytes()[start:].decode(errors="replace")[-_OUTPUT_KEPT:] if log.exists() else ""


def _outcomes(directory: Path, adapted: Adapted) -> Path:
    return directory / f"{adapted}.json"


def _log(directory: Path, adapted: Adapted) -> Path:
    return directory / f"{adapted}.log"


def _by_flora_fx(settings: Settings, model: Any, folders: list[Path], **options: Any) -> Iterator[None]:
    # Where a GPU's provider is not installed yet, the check is the CPU's; contenders are checked once more.
    providers = dict.fromkeys((PROVIDERS[settings.device], PROVIDERS["cpu"]))
    options.setdefault("custom_ops", False)  # whether they are built here must not decide what is measured
    export_onnx(model, folders[0], providers=[*providers], overwrite=True, **options)
    yield


_hot_swap = partial(_by_flora_fx, hot_swap=True)
_custom_ops = partial(_by_flora_fx, custom_ops=True)
_custom_ops_hot_swap = partial(_by_flora_fx, custom_ops=True, hot_swap=True)
_general = partial(_by_flora_fx, target="general")


def _by_transformers(settings: Settings, model: Any, folders: list[Path]) -> Iterator[None]:
    """As ``OnnxConfig(dynamic=True)`` has it, then with ``ort_fusions``, which rewrite that graph in the end."""
    onnx = require("transformers.exporters.exporter_onnx", "hf")
    fusions = require("transformers.exporters.onnxruntime_fusions", "hf")
    plain, fused = folders
    ids = torch.arange(2 * 5).reshape(2, 5)  # no size of 1: it would become a constant
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exported = onnx.OnnxExporter().export_for_generation(unwrap(model), inputs, onnx.OnnxConfig(dynamic=True))
    exported.save_pretrained(plain)
    yield
    for component in exported.components.values():
        fusions.fuse_for_onnxruntime(component.program, settings.device)
    exported.save_pretrained(fused)
    yield


def _by_genai(settings: Settings, model: Any, folders: list[Path]) -> Iterator[None]:
    """By the command line of onnxruntime-genai's model builder. A PEFT model is taken apart: nobody needs it after."""
    require("onnxruntime_genai", "genai")  # before a checkpoint is written
    with tempfile.TemporaryDirectory(dir=folders[0].parent) as place:
        command = builder_command(settings, *write_checkpoint(model, Path(place)), folders[0])
        if code := subprocess.run(command, check=False).returncode:
            raise ExportError(f"the model builder of onnxruntime-genai ended with {code}")
    yield


def write_checkpoint(model: Any, place: Path) -> tuple[Path, Path | None]:
    """Write a model, a tokenizer and, of a PEFT model, its adapter, as others read them. A PEFT model is taken apart.

    Returns:
        the folders of the model and of the adapter, in ``place``.
    """
    checkpoint, adapter = place / "checkpoint", None
    if isinstance(model, require("peft", "hf").PeftModel):
        adapter = place / "adapter"
        model.save_pretrained(str(adapter))
        model = model.unload()
    model.save_pretrained(str(checkpoint))
    _tokenizer().save_pretrained(checkpoint)
    return checkpoint, adapter


def builder_command(settings: Settings, checkpoint: Path, adapter: Path | None, output: Path) -> list[str]:
    """The command line of onnxruntime-genai's model builder.

    Raises:
        MissingExtraError: onnxruntime-genai is not installed.
    """
    require("onnxruntime_genai", "genai")
    precision = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[settings.dtype]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(output)]
    options = ["hf_token=false", *([] if adapter is None else [f"adapter_path={adapter}"])]
    cache = checkpoint.parent / "cache"
    return [*command, "-p", precision, "-e", settings.device, "-c", str(cache), "--extra_options", *options]


def _tokenizer() -> Any:
    """Of one word: the builder wants one beside the weights, the graph does not depend on it."""
    transformers, tokenizers = require("transformers", "hf"), require("tokenizers", "hf")
    words = tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), unk_token="<unk>")


_WRITERS: dict[Adapted, dict[tuple[str, ...], _Writer]] = {
    "base": {
        ("base",): _by_flora_fx,
        ("base (general)",): _general,
        ("base (transformers)", "base (transformers, ort_fusions)"): _by_transformers,
        ("base (genai)",): _by_genai,
    },
    "peft": {
        ("fused",): _by_flora_fx,
        ("fused (custom ops)",): _custom_ops,
        ("fused (custom ops, hot swap)",): _custom_ops_hot_swap,
        ("fused (hot swap)",): _hot_swap,
        ("fused (general)",): _general,
        ("PEFT (transformers)", "PEFT (transformers, ort_fusions)"): _by_transformers,
        ("PEFT (genai)",): _by_genai,
    },
    "merged": {("merged",): _by_flora_fx},
    **{adapted: {(f"FFBA {place} (fused)",): _by_flora_fx} for adapted, place in PLACEMENTS.items()},
}
"""By model: what writes which contenders, one folder each, in this order; the builder of genai comes last."""

GRAPHS: dict[str, Adapted] = {
    name: adapted for adapted, writers in _WRITERS.items() for names in writers for name in names
}
"""Which model each graph is of, by its name."""
