"""What each way to deploy a QLoRA keeps of it: a small model learns a task over a base in few bits, and is exported.

live, …                 the base as it was trained on, the adapter beside it
merged in float         the base dequantized, the adapter added: as exact, in four bytes a weight
merged, … again         the sum put into few bits anew: what the adapter changed by less than half a step is gone
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.export import export_onnx, load
from flora_fx.measuring.method import difference
from flora_fx.quantized import dequantize
from flora_fx.quantized.nearest import quantize_linears
from flora_fx.quantized.weight import Kind

from ..accuracy.descent import scheduled, step
from ..accuracy.generation import Generation, batch_of
from ..accuracy.methods import LORA, adapted
from ..accuracy.model import Pretraining, pretrained
from ..accuracy.recipe import Recipe
from ..accuracy.run import percent_right
from ..accuracy.tasks import SIZES, splits
from ..measure.isolated import Progress

__all__ = ["FORMATS", "TASK", "measure"]

FORMATS: dict[str, tuple[Kind, int]] = {"4 bits": ("affine", 32), "NF4": ("nf4", 64)}
"""The kind of weights, and how many share a scale, by what the table calls them."""

TASK = "sort descending"
_SIZES = {**SIZES, "train": 2048}
_RATE, _RANK = 2e-3, 8
_EXAMPLES = 64
"""Whose logits are compared."""


def measure(pretraining: Pretraining, recipe: Recipe, place: Path, progress: Progress) -> list[dict[str, Any]]:
    """Train over a base of each format, and export what came of it in every way.

    Args:
        pretraining: of the base; its sizes are multiples of 64.
        recipe: of the training of the adapter.
        place: where the base is kept.
        progress: called with the exports done and in all.

    Returns:
        rows with ``format``, ``way``, ``bytes`` of the file of weights, ``error`` (of the logits, to float64 over the
        dequantized base with its adapter, in norms), and ``accuracy`` (answers that are right, in percent).
    """
    learner = Generation(str(pretrained(pretraining, place, lambda done, total: None)))
    data = splits(TASK, _SIZES)
    exam = learner.table(TASK, data["test"])
    rows: list[dict[str, Any]] = []
    for name, (kind, block) in FORMATS.items():
        quantized = quantize_linears(learner.load(), kind, block=block)
        untuned = copy.deepcopy(quantized)
        tuned = _trained(learner, quantized, data["train"], recipe)
        tokens, _ = batch_of(data["test"][:_EXAMPLES])
        exact = _plain(tuned).double()(input_ids=tokens, use_cache=False).logits
        ways = _ways(name, kind, block, untuned, tuned)
        for way, (model, options) in ways.items():
            with tempfile.TemporaryDirectory(prefix="flora-quantized-") as out:
                result = export_onnx(model, Path(out, "onnx"), **options)
                runner = _Runner(load(result.directory))
                rows.append(
                    {
                        "format": name,
                        "way": way,
                        "bytes": result.files["model.onnx.data"],
                        "error": difference(runner(input_ids=tokens).logits, exact),
                        "accuracy": percent_right(partial(learner.right, runner), exam, torch.arange(len(exam))).item(),
                    }
                )
            progress(len(rows), 5 * len(FORMATS) + 1)
    return rows


def _ways(
    name: str, kind: Kind, block: int, untuned: nn.Module, tuned: nn.Module
) -> Mapping[str, tuple[nn.Module, dict[str, Any]]]:
    merged = _plain(tuned).merge_and_unload()
    again = quantize_linears(copy.deepcopy(merged), kind, block=block)
    found: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "no adapter": (untuned, {}),
        "live, kept": (tuned, {"base": "keep"}),
        "live, dequantized at load": (tuned, {"base": "dequantize"}),
        "merged in float": (merged, {}),
        f"merged, {name} again": (again, {}),
    }
    if kind == "affine":
        found["live, kept, int8 activations"] = (tuned, {"base": "keep", "activations": "int8"})
    return found


def _trained(learner: Generation, model: nn.Module, examples: Any, recipe: Recipe) -> Any:
    torch.manual_seed(0)
    tuned = adapted(model, LORA, _RANK, learner.task_type).train()
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.0)
    order = itertools.cycle(range(0, len(examples) - recipe.batch + 1, recipe.batch))
    for index, start in enumerate(itertools.islice(order, recipe.steps)):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * scheduled(index, recipe.steps)
        step(optimizer, learner.loss(tuned, *batch_of(examples[start : start + recipe.batch])))
    return tuned.eval()


def _plain(model: nn.Module) -> Any:
    """A copy whose base is dequantized."""
    return dequantize(model, torch.float32)


class _Runner(nn.Module):
    """An export, called as a model is."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self._run: Callable[[Tensor, Tensor], Tensor] = decoder

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self._run(input_ids, torch.ones_like(input_ids)))
