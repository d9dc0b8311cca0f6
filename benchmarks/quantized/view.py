"""Tables of a QLoRA's ways to be deployed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..show.sheet import Sheet

__all__ = ["setup", "sheets"]


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """What each way keeps of the task, what a token takes, and what the weights take."""
    found = result["quantized"]
    task = [
        [row["format"], row["way"], f"{row['bytes'] / 1e3:,.0f}", f"{row['error']:.1e}", f"{row['accuracy']:.1f}"]
        for row in found["task"]
    ]
    tokens = [
        [
            row["way"],
            f"{row['bytes'] / 1e6:,.1f}",
            f"{row['error']:.1e}",
            f"{row['milliseconds']:.2f}",
            f"{1e3 / row['milliseconds']:,.0f}",
            f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f})",
        ]
        for row in found["decode"]
    ]
    whole = found["sizes"][0]["bytes"]
    sizes = [
        [row["way"], f"{row['bytes'] / 1e6:,.1f}", f"{row['bytes'] / whole:.3f}", f"{row['adapter'] / 1e6:,.2f}"]
        for row in found["sizes"]
    ]
    return [
        Sheet(
            "A trained task, by what became of base and adapter",
            ["base", "way", "kB of weights", "error", "right answers, %"],
            task,
            [
                "Error: of the logits, to float64 over the dequantized base with its adapter, in norms. The file holds "
                "the embedding, too, in float32.",
                "Merged in float is as exact as live, and takes four bytes a weight: what is live keeps the size, and "
                "can be swapped. Merged into few bits again, the adapter is rounded with the base.",
            ],
        ),
        Sheet(
            "A token on ONNX Runtime",
            ["way", "MB of weights", "error", "TPOT, ms", "tokens/s", "× float32, no adapter"],
            tokens,
            [
                "Error: of the logits, to PyTorch, over the largest. One token a round of a stream of each, in turns. "
                "A LoRA that is merged in float is the first row; one that is merged into 4 bits again is `4 bits "
                "kept, no adapter`.",
            ],
        ),
        Sheet(
            f"The linear layers of one layer of {found['shape']} in the file",
            ["weights", "MB", "× float16", "MB of the adapter"],
            sizes,
            ["All layers are alike, so that the ratio is that of the model."],
        ),
    ]


def setup(result: Mapping[str, Any]) -> str:
    """The sentences about what was measured."""
    found, settings = result["quantized"], result["settings"]
    return (
        f"A Llama of {found['hidden']} × {found['layers']}, pretrained here, learns the task *{found['task_name']}* by "
        f"a LoRA of rank 8 over its base in few bits. Tokens: {settings['shape']} shape, {settings['layers']} layers, "
        f"LoRA of rank {settings['rank']}, {settings['threads']} CPU threads, behind a prompt of {found['prompt']}."
    )
