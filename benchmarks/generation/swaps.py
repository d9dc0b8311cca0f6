"""Swaps of the adapter of an export that was made for them, with generations in between."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..contenders.models import make_model
from ..measure.isolated import Progress, isolated
from ..measure.memory import resident_bytes
from .loops import Job

__all__ = ["SWAPPED", "Swaps", "measure_swaps", "references", "swap"]

SWAPPED = 8
"""Tokens that are generated after each swap."""


@dataclass(frozen=True)
class Swaps:
    """What is swapped.

    Attributes:
        adapters: directories of PEFT.
        prompt: tokens [batch, prompt].
        expected: what PyTorch continues the prompt with under each, `SWAPPED` tokens a row.
        count: how many swaps are measured.
    """

    adapters: tuple[Path, ...]
    prompt: list[list[int]]  # a tensor would not outlive the process that made it
    expected: tuple[list[list[int]], ...]
    count: int


def measure_swaps(job: Job, place: Path, count: int, progress: Progress) -> dict[str, Any]:
    """What `swap` finds.

    Args:
        job: of an export with ``hot_swap``.
        place: folder for the adapters.
        count: how many swaps are measured.
        progress: called with the swaps done and in all.
    """
    threads = job.settings.threads
    what = isolated(references, job, place, count, threads=threads, progress=lambda done, total: None)
    found: dict[str, Any] = isolated(swap, job, what, threads=threads, progress=progress)
    return found


@torch.no_grad()
def references(job: Job, place: Path, count: int, progress: Progress) -> Swaps:
    """The exported LoRA and one with B of the other sign, written to directories, and their greedy tokens."""
    model: Any = make_model(job.settings, "peft")
    prompt = job.text(torch.Generator().manual_seed(0))
    adapters, expected = (place / "exported", place / "other"), []
    for adapter in adapters:
        model.save_pretrained(adapter)
        ids = prompt.to(job.settings.device)
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=SWAPPED,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(written[:, job.prompt :].tolist())
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.neg_()
    return Swaps(adapters, prompt.tolist(), tuple(expected), count)


def swap(job: Job, what: Swaps, progress: Progress) -> dict[str, Any]:
    """Swap the adapters in turns, each time from its directory, and generate with each.

    Returns:
        ``count``; ``milliseconds`` of a swap, the median, ``low`` and ``high``, what 95% of them lie between;
        ``right``, after how many the tokens were PyTorch's; ``before`` and ``after``, resident bytes.
    """
    decoder, prompt = job.decoder(), torch.tensor(what.prompt)
    taken: list[float] = []
    right = before = 0
    warm = 2 * len(what.adapters)
    for done in range(warm + what.count):
        if done == warm:
            taken, right, before = [], 0, resident_bytes()
        which = (done + 1) % len(what.adapters)
        start = time.perf_counter_ns()
        decoder.load_adapter(what.adapters[which])
        taken.append((time.perf_counter_ns() - start) / 1e6)
        tokens = decoder.generate(prompt, max_new_tokens=SWAPPED, eos_token_id=[])[:, job.prompt :]
        right += tokens.tolist() == what.expected[which]
        progress(done + 1, warm + what.count)
    low, middle, high = torch.tensor(taken).quantile(torch.tensor([0.025, 0.5, 0.975])).tolist()
    return {
        "count": what.count,
        "milliseconds": middle,
        "low": low,
        "high": high,
        "right": right,
        "before": before,
        "after": resident_bytes(),
    }
