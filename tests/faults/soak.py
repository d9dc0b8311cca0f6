"""Generate and swap adapters for a long time: ``python -m tests.faults.soak --minutes 30 --record soak.json``.

One decoder, several LoRAs, prompts of several shapes. Before each generation a LoRA is put in, from disk or from a
model; each time the tokens must be those that PyTorch generates with it. Resident memory is sampled all the while, and
is flat where its trend over the last two thirds of the time (the first third fills caches), which is the slope of a
least-squares line times their length, is less than `ALLOWED`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from flora_fx.export import Decoder, export_onnx, load
from flora_fx.export.directory.manifest import versions

from .models import ADAPTERS, VOCAB, adapted, expected_tokens

__all__ = ["ALLOWED", "Soak", "soak", "trend"]

ALLOWED = 2 * 2**20
"""Bytes of growth over the last two thirds; a leak of 100 bytes in each of the swaps of half an hour is more."""

SHAPES = ((1, 3, 8), (2, 5, 12), (1, 17, 4), (3, 4, 16))
"""Rows, tokens of the prompt, new tokens."""


@dataclass(frozen=True)
class Soak:
    """What was met.

    Attributes:
        started: when, UTC.
        seed: of what was chosen.
        seconds: how long it took.
        swaps: how often an adapter was put in.
        tokens: that were generated and compared.
        wrong: generations that were not PyTorch's.
        first, last: resident memory in bytes, first of the last two thirds and last.
        grown: bytes, by the trend over the last two thirds.
        flat: whether that is less than `ALLOWED`.
        samples: (seconds, bytes), some 100 of them.
        versions: of the packages.
    """

    started: str
    seed: int
    seconds: float
    swaps: int
    tokens: int
    wrong: int
    first: int
    last: int
    grown: int
    flat: bool
    samples: list[tuple[float, int]]
    versions: dict[str, str]


def soak(seconds: float, seed: int = 0, interval: float = 1.0) -> Soak:
    """Generate and swap.

    Args:
        seconds: at least so long.
        seed: for what comes when.
        interval: between two samples of the memory, in seconds.
    """
    torch.set_num_threads(1)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    model = adapted(*ADAPTERS, layers=2)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model.save_pretrained(place / "adapters")
        export_onnx(model, place / "export", hot_swap=True)
        decoder = _decoder(place / "export")
        prompts = [torch.tensor([[draw.randrange(VOCAB) for _ in range(n)] for _ in range(b)]) for b, n, _ in SHAPES]
        expected = {
            (name, shape): expected_tokens(model, name, prompts[shape], count)
            for name in ADAPTERS
            for shape, (_, _, count) in enumerate(SHAPES)
        }
        swaps = tokens = wrong = 0
        samples: list[tuple[float, int]] = []
        start = time.monotonic()
        while (now := time.monotonic() - start) < seconds:
            if now >= len(samples) * interval:
                samples.append((round(now, 1), resident()))
            name, shape = draw.choice(list(ADAPTERS)), draw.randrange(len(SHAPES))
            if draw.random() < 0.5:
                decoder.load_adapter(place / "adapters" / name)
            else:
                model.set_adapter(name)
                decoder.load_adapter(model)
            found = decoder.generate(prompts[shape], max_new_tokens=SHAPES[shape][2], eos_token_id=[])
            wrong += not torch.equal(found, expected[name, shape])
            swaps += 1
            tokens += SHAPES[shape][0] * SHAPES[shape][2]
        seconds = time.monotonic() - start
    settled = samples[len(samples) // 3 :]
    grown = trend(settled)
    step = max(1, len(samples) // 100)
    return Soak(
        started=started,
        seed=seed,
        seconds=round(seconds, 1),
        swaps=swaps,
        tokens=tokens,
        wrong=wrong,
        first=settled[0][1],
        last=settled[-1][1],
        grown=grown,
        flat=abs(grown) < ALLOWED,
        samples=samples[::step],
        versions=versions(),
    )


def trend(samples: Sequence[tuple[float, int]]) -> int:
    """By how much memory grows from the first sample to the last, along a least-squares line.

    >>> trend([(0.0, 100), (1.0, 104), (2.0, 108)])
    8
    """
    times, sizes = np.array([at for at, _ in samples]), np.array([size for _, size in samples], dtype=np.float64)
    slope = np.polyfit(times, sizes - sizes[0], 1)[0]
    return round(float(slope * (times[-1] - times[0])))


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _decoder(directory: Path) -> Decoder:
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    found = load(directory, providers=["CPUExecutionProvider"], session_options=options)
    assert isinstance(found, Decoder)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="a JSON file to write what was met to")
    options = parser.parse_args()
    met = soak(options.minutes * 60, options.seed)
    if options.record is not None:
        options.record.write_text(json.dumps(asdict(met)) + "\n", encoding="utf-8")
    print(
        f"{met.swaps} swaps and {met.tokens} tokens in {met.seconds:.0f} s, {met.wrong} generations wrong; "
        f"resident {met.last / 2**20:.0f} MiB, trend {met.grown / 2**20:+.2f} MiB over the last two thirds "
        f"({'flat' if met.flat else 'not flat'})"
    )
    return 0 if met.flat and not met.wrong else 1


if __name__ == "__main__":
    sys.exit(main())
