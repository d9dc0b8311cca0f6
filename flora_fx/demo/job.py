"""What a user does with their own checkpoints: capture, fuse, verify, export, generate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

import flora_fx
from flora_fx.demo.step import CachedStep
from flora_fx.measuring.sessions import session_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["PROMPTS", "capture_and_fuse", "export_all", "write_texts"]

PROMPTS = ("Beautiful is", "If the implementation", "Special cases")
Progress = Callable[[int, int], None]
Graphs = dict[str, tuple[fx.GraphModule, fx.GraphModule]]


def capture_and_fuse(
    models: Mapping[str, nn.Module], prompt: Tensor, progress: Progress
) -> tuple[Graphs, flora_fx.FusionReport, dict[str, dict[str, float]]]:
    """Capture prefill and decode of every model, fuse those of the unmerged one and compare in float64.

    Returns:
        The two graphs of each contender, ``fused`` among them; the report of the fused decode graph; and the
        errors of both fused graphs against the unmerged ones.
    """
    graphs: Graphs = {}
    with torch.no_grad():
        past = CachedStep(models["base"])(prompt)[1:]
        inputs = {"prefill": (prompt,), "decode": (prompt[:, -1:], *past)}
        for done, (name, model) in enumerate(models.items()):
            step = CachedStep(model).eval()
            graphs[name] = (
                flora_fx.capture(step, *inputs["prefill"]),
                flora_fx.capture(step, *inputs["decode"]),
            )
            progress(done + 1, len(models) + 1)
        prefill, decode = (flora_fx.fuse(graph) for graph in graphs["unmerged"])
        verification = {}
        for phase, original, fused in zip(inputs, graphs["unmerged"], (prefill, decode), strict=True):
            seen = flora_fx.verify(original, fused, *inputs[phase])
            verification[phase] = {"max_abs": seen.max_abs, "max_rel": seen.max_rel}
        progress(len(models) + 1, len(models) + 1)
    graphs["fused"] = (prefill, decode)
    return graphs, flora_fx.report(decode), verification


def write_texts(models: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, *, new: int) -> list[dict[str, str]]:
    """Continue the prompts greedily with base and adapter in PyTorch, as they were loaded."""
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        text = {"prompt": prompt}
        for label, model in (("base", models["base"]), ("adapter", models["unmerged"])):
            written = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
            )
            text[label] = _new_text(tokenizer, ids, written)
        texts.append(text)
    return texts


def export_all(
    models: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    texts: list[dict[str, str]],
    progress: Progress,
    *,
    new: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Export base, unmerged, fused and merged, continue the prompts with the fused one under ONNX Runtime.

    Each of `texts` gets an ``onnx`` beside ``base`` and ``adapter``.

    Returns:
        The loaded exports by contender, and the errors that `export_onnx` found against PyTorch.
    """
    from flora_fx.export import export_onnx, load

    runners: dict[str, Any] = {}
    checks: dict[str, Any] = {}
    adapted, merged = models["unmerged"], models["merged"]
    sources = {"base": models["base"], "unmerged": _left_as_it_is(adapted), "fused": adapted, "merged": merged}
    for done, (name, model) in enumerate(sources.items()):
        exported = export_onnx(model, directory / name, tokenizer=tokenizer, overwrite=True)
        checks[name] = {
            "max_abs_error": exported.max_abs_error,
            "greedy_tokens_equal": exported.greedy_tokens_equal,
        }
        runners[name] = load(directory / name, session_options=session_options())
        progress(done + 1, len(sources))
    for text in texts:
        ids = tokenizer(text["prompt"], return_tensors="pt")["input_ids"]
        text["onnx"] = _new_text(tokenizer, ids, runners["fused"].generate(ids, max_new_tokens=new))
    return runners, checks


def _left_as_it_is(model: nn.Module) -> nn.Module:
    """A copy whose LoRA computes the same and is not fused: a vector of equal numbers scales it.

    PEFT has no exporter of its own; this is ours, with the adapters as PEFT writes them.
    """
    from peft.tuners.lora import Linear

    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.scaling = {name: torch.full((layer.out_features,), scale) for name, scale in layer.scaling.items()}
    return model


def _new_text(tokenizer: PreTrainedTokenizerFast, prompt: Tensor, written: Tensor) -> str:
    text: str = tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
    return text
