"""Who is measured against whom, in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.demo.step import CachedStep
from flora_fx.measuring.method import Timing, compare

__all__ = ["onnx_latency", "torch_latency"]

Latency = dict[str, dict[str, Timing]]


def torch_latency(
    models: Mapping[str, nn.Module],
    graphs: Mapping[str, tuple[nn.Module, nn.Module]],
    prompt: Tensor,
    rounds: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> Latency:
    """Time a prefill of the prompt and one decode step after it, both with a KV cache.

    The captured graphs are compared with each other, all run op by op without a compiler. The models as
    transformers and PEFT run them (``live``) stand beside them, because a capture alone already changes the latency.

    Args:
        models: ``base`` and ``unmerged``, not captured. They are copied: a contender that shares its weights
            with another finds them in a cache that the other has filled.
        graphs: the prefill and the decode graph of each contender.
        prompt: [1, tokens].
    """
    with torch.inference_mode():
        steps = {f"{name}, live": CachedStep(copy.deepcopy(models[name])) for name in ("base", "unmerged")}
        past = steps["base, live"](prompt)[1:]
        prefill: dict[str, nn.Module] = {name: pair[0] for name, pair in graphs.items()} | steps
        decode: dict[str, nn.Module] = {name: pair[1] for name, pair in graphs.items()} | steps
        half = partial(_half, progress)
        return {
            "TTFT": compare(
                {name: partial(step, prompt) for name, step in prefill.items()},
                reference="base",
                rounds=rounds,
                seed=seed,
                progress=half(0),
            ),
            "TPOT": compare(
                {name: partial(step, prompt[:, -1:], *past) for name, step in decode.items()},
                reference="base",
                rounds=rounds,
                seed=seed,
                progress=half(1),
            ),
        }


def onnx_latency(
    runners: Mapping[str, Any],
    prompt: Tensor,
    rounds: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> Latency:
    """Time the first token of a stream, and then one token a round of one stream per contender.

    The KV caches of the streams grow by one token a round, all of them alike.

    Args:
        runners: what `flora_fx.export.load` returned, by contender.
        prompt: [1, tokens].
    """
    warm_up = 3
    half = partial(_half, progress)
    first = compare(
        {name: partial(_first_token, runner, prompt) for name, runner in runners.items()},
        reference="base",
        rounds=rounds,
        seed=seed,
        progress=half(0),
    )
    streams = {
        name: runner.stream(prompt, max_new_tokens=rounds + warm_up + 1, eos_token_id=[])
        for name, runner in runners.items()
    }
    for stream in streams.values():
        next(stream)  # the prefill
    later = compare(
        {name: partial(next, stream) for name, stream in streams.items()},
        reference="base",
        rounds=rounds,
        seed=seed,
        warm_up=warm_up,
        progress=half(1),
    )
    return {"TTFT": first, "TPOT": later}


def _first_token(runner: Any, prompt: Tensor) -> Tensor:
    first: Tensor = next(iter(runner.stream(prompt, max_new_tokens=1)))
    return first


def _half(progress: Callable[[int, int], None], phase: int) -> Callable[[int, int], None]:
    """Two measurements share one progress bar."""
    return lambda done, total: progress(phase * total + done, 2 * total)
