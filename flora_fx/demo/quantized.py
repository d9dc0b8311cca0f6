"""The demo over a base in few bits: a QLoRA is trained, and deployed as it was trained, and merged in two ways.

live                    4 bits a weight, the adapter beside them
merged in float         the base dequantized, the adapter added
merged, 4 bits again    the sum in 4 bits: as small, and no longer what was trained
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flora_fx.checkpoint import load_model
from flora_fx.demo.job import PROMPTS
from flora_fx.demo.text import prose, zen
from flora_fx.demo.train import adapter_recipe, base_recipe, build_tokenizer, train_adapter, train_base
from flora_fx.errors import require
from flora_fx.measuring.environment import environment
from flora_fx.measuring.method import pinned
from flora_fx.progress import bars
from flora_fx.quantized import dequantize
from flora_fx.quantized.nearest import quantize_linears

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["LIVE", "run_quantized", "show_quantized"]

LIVE = "live"
_THREADS, _BLOCK = 2, 32


def run_quantized(
    output: str | Path, *, fast: bool = False, seed: int = 0, console: Console | None = None
) -> dict[str, Any]:
    """Train a base, put it into 4 bits, train a LoRA over it, and export that.

    Args:
        output: the directory; made when missing. It will hold ``base/`` and ``adapter/`` (checkpoints), ``onnx/``
            (exported directories) and ``demo.json``.
        fast: a few training steps: everything runs, the texts and the numbers say nothing.
        seed: of the training.
        console: where progress bars go; None for silence.

    Returns:
        What ``demo.json`` holds.

    Raises:
        MissingExtraError: one of the extras ``hf``, ``onnx`` and ``cli`` is not installed.
    """
    from flora_fx.export import export_onnx, load

    started = time.perf_counter()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with pinned(_THREADS), bars(console) as bar:
        tokenizer = build_tokenizer([prose(), zen()], output / "base")
        of_base, of_adapter = base_recipe(fast=fast), adapter_recipe(fast=fast)
        layers = 2 if fast else 4
        train_base(prose(), tokenizer, output / "base", of_base, bar("train the base"), seed=seed, layers=layers)
        quantized = quantize_linears(load_model(output / "base"), block=_BLOCK)
        adapter = output / "adapter"
        train_adapter(quantized, zen(), tokenizer, adapter, of_adapter, bar("train the adapter"), seed=seed)
        models = _models(output / "base", adapter)
        text = torch.tensor([tokenizer(zen())["input_ids"][: 32 if fast else 256]])
        found: dict[str, Any] = {}
        tick = bar("export to ONNX")
        for done, (name, model) in enumerate(models.items()):
            place = output / "onnx" / name.replace(",", "").replace(" ", "-")
            result = export_onnx(model, place, tokenizer=tokenizer, overwrite=True, hot_swap=name == LIVE)
            runner: Any = load(place)
            found[name] = {
                "bytes": result.files["model.onnx.data"],
                "max_rel_error": result.max_rel_error,
                "right": _right(runner(text, torch.ones_like(text)), text),
                "texts": {prompt: _continued(tokenizer, runner, prompt, 8 if fast else 28) for prompt in PROMPTS},
                "notes": list(result.notes),
            }
            tick(done + 1, len(models))
    document = {
        "environment": environment("flora-fx demo --quantized") | {"threads": _THREADS},
        "quantized": found,
        "seconds": round(time.perf_counter() - started, 1),
    }
    (output / "demo.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return document


def _models(base: Path, adapter: Path) -> dict[str, nn.Module]:
    peft: Any = require("peft", "hf")
    held = quantize_linears(load_model(base), block=_BLOCK)
    live = peft.PeftModel.from_pretrained(held, adapter).eval()
    plain: Any = dequantize(live, torch.float32)
    merged = plain.merge_and_unload()
    again = quantize_linears(copy.deepcopy(merged), block=_BLOCK)
    return {LIVE: live, "merged in float": merged, "merged, 4 bits again": again}


def _right(logits: Tensor, text: Tensor) -> float:
    """How many tokens of a text are the likeliest ones, in percent."""
    return 100 * float((logits[:, :-1].argmax(-1) == text[:, 1:]).double().mean())


def _continued(tokenizer: Any, runner: Any, prompt: str, new: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written: str = tokenizer.decode(runner.generate(ids, max_new_tokens=new)[0, ids.shape[1] :])
    return written


def show_quantized(result: dict[str, Any], output: Path, console: Console) -> None:
    """Print what `run_quantized` returned.

    Args:
        result: the contents of ``demo.json``.
        output: the directory it lies in.
        console: where to print.
    """
    escape = require("rich.markup", "cli").escape
    for note in result["quantized"][LIVE]["notes"]:
        console.print(escape(note))
    for name, way in result["quantized"].items():
        sizes = f"{way['bytes'] / 1e6:.2f} MB of weights, {way['right']:.1f}% of the Zen's tokens right"
        console.print(f"\n[bold]{escape(name)}[/]: {sizes}, error {way['max_rel_error']:.1e}")
        for prompt, text in way["texts"].items():
            flat = text.strip().replace("\n", " ⏎ ")
            console.print(f"  {escape(prompt)} … {escape(flat)}", highlight=False, no_wrap=True, overflow="ellipsis")
    console.print(f"\n{result['seconds']:.0f} s; checkpoints, exports and demo.json: {escape(str(output))}")
