"""A decoder's loop, tokens chosen and all: beside onnxruntime-genai's, and how much of it is our Python."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora_fx.errors import require
from flora_fx.export import Decoder, load
from flora_fx.measuring.method import Clock, paired, take_turns
from flora_fx.measuring.sessions import QUIET, session_options

from ..contenders.onnx_exports import PROVIDERS
from ..contenders.settings import Settings
from ..measure.isolated import Progress

__all__ = ["CHOICES", "LOOPS", "Job", "loops", "python", "related"]

CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top-k, top-p": {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 0},
}
"""How tokens are chosen where our Python is measured; options of `Decoder.stream`."""

Samples = dict[str, list[list[float]]]


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
        settings: model and device.
        directory: of an export.
        prompt: length in tokens.
        new: tokens after the first one.
        passes: generations.
    """

    settings: Settings
    directory: Path
    prompt: int
    new: int
    passes: int

    def text(self, drawn: torch.Generator) -> Tensor:
        """A prompt, [batch, prompt], on the CPU."""
        return torch.randint(self.settings.vocabulary, (self.settings.batch, self.prompt), generator=drawn)

    def decoder(self) -> Decoder:
        """The export, loaded; on a GPU with a CUDA graph."""
        settings = self.settings
        decoder = load(
            self.directory,
            providers=[PROVIDERS[settings.device]],
            session_options=session_options(settings.threads),
            verify=False,
            cuda_graph=settings.device == "cuda",
        )
        assert isinstance(decoder, Decoder)
        return decoder


class _Ours:
    """`Decoder.stream`."""

    def __init__(self, job: Job) -> None:
        self._decoder = job.decoder()
        self._count = job.new + 1
        self.tokens: list[list[int]] = []

    def start(self, prompt: Tensor) -> None:
        """Run a prompt and choose the first token."""
        self.tokens = []
        self._stream = self._decoder.stream(prompt, max_new_tokens=self._count, eos_token_id=[])
        self.go_on()

    def go_on(self) -> None:
        """Choose one more token."""
        self.tokens.append(next(self._stream).tolist())


class _Genai:
    """onnxruntime-genai's `Generator`, as its examples use it."""

    def __init__(self, job: Job) -> None:
        self._genai = require("onnxruntime_genai", "genai")
        settings = job.settings
        config = self._genai.Config(str(job.directory))
        options = {"intra_op_num_threads": settings.threads, **dict([QUIET])}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        config.clear_providers()  # whatever device the export was checked on
        if settings.device == "cuda":
            config.append_provider("cuda")
            config.set_provider_option("cuda", "enable_cuda_graph", "1")
        self._model = self._genai.Model(config)
        length = job.prompt + job.new + 1
        self._search = {
            "max_length": length,
            "min_length": length,  # for want of a way to have no end token: that one is passed over
            "batch_size": settings.batch,
            "do_sample": False,
        }
        self.tokens: list[list[int]] = []

    def start(self, prompt: Tensor) -> None:
        """As `_Ours.start`."""
        self.tokens = []
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(**self._search)
        self._generator = self._genai.Generator(self._model, parameters)
        self._generator.append_tokens(prompt.to(torch.int32).numpy())
        self.go_on()

    def go_on(self) -> None:
        """As `_Ours.go_on`."""
        self._generator.generate_next_token()
        self.tokens.append(self._generator.get_next_tokens().tolist())


LOOPS: dict[str, type[_Ours] | type[_Genai]] = {"onnxruntime-genai": _Genai, "flora_fx": _Ours}
"""By name; the first one is what ratios are taken to."""


def loops(job: Job, seed: int, progress: Progress) -> dict[str, Any]:
    """Let the loops take turns at every token.

    Returns:
        ``ttft`` and ``tpot``: loop -> milliseconds, a list of rounds per pass. ``equal``: passes in which both chose
        the same tokens.
    """
    drawn, order, clock = torch.Generator().manual_seed(seed), random.Random(seed), Clock(job.settings.device)
    running = {name: LOOPS[name](job) for name in order.sample([*LOOPS], len(LOOPS))}
    found: dict[str, Samples] = {metric: {name: [] for name in LOOPS} for metric in ("ttft", "tpot")}
    equal = 0
    for done in range(-1, job.passes):  # the first one warms up
        prompt = job.text(drawn)
        first = take_turns({name: _start(loop, prompt) for name, loop in running.items()}, clock, order)
        steps = [take_turns({n: loop.go_on for n, loop in running.items()}, clock, order) for _ in range(job.new)]
        if done < 0:
            continue
        for name in LOOPS:
            found["ttft"][name].append([first[name]])
            found["tpot"][name].append([step[name] for step in steps])
        one, other = running.values()
        equal += one.tokens == other.tokens
        progress(done + 1, job.passes)
    return {**found, "equal": equal}


def _start(loop: _Ours | _Genai, prompt: Tensor) -> Callable[[], None]:
    return lambda: loop.start(prompt)


def related(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `loops` found in several processes, related to the first loop."""
    reference = next(iter(LOOPS))

    def passes(metric: str, name: str) -> list[list[float]]:
        return [one for group in groups for one in group[metric][name]]

    rows = [
        {"variant": name}
        | {
            metric: asdict(paired(passes(metric, name), passes(metric, reference), processes=len(groups)))
            for metric in ("ttft", "tpot")
        }
        for name in LOOPS
    ]
    return {
        "rows": rows,
        "equal": sum(group["equal"] for group in groups),
        "generations": len(passes("ttft", reference)),
    }


class _Timed:
    """An ``onnxruntime.InferenceSession`` that adds up the milliseconds inside its runs."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.taken = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, *arguments: Any) -> None:
        start = time.perf_counter_ns()
        self._session.run_with_iobinding(*arguments)
        self.taken += (time.perf_counter_ns() - start) / 1e6


def python(job: Job, progress: Progress) -> dict[str, Any]:
    """What of a token is spent outside of ONNX Runtime; the loop runs alone, as its user's does.

    Returns:
        by choice, medians over tokens in milliseconds: ``step``, ``run`` (of it in ONNX Runtime), ``rest``.
    """
    decoder = job.decoder()
    timed = decoder.session._session = _Timed(decoder.session._session)
    drawn = torch.Generator().manual_seed(0)
    found = {}
    for index, (choice, options) in enumerate(CHOICES.items()):
        steps, runs = [], []
        for done in range(-1, job.passes):
            stream = decoder.stream(job.text(drawn), max_new_tokens=job.new + 1, eos_token_id=[], **options)
            next(stream)
            for _ in range(job.new):
                before, start = timed.taken, time.perf_counter_ns()
                next(stream)
                if done >= 0:
                    steps.append((time.perf_counter_ns() - start) / 1e6)
                    runs.append(timed.taken - before)
            progress(index * job.passes + done + 1, len(CHOICES) * job.passes)
        rest = [step - run for step, run in zip(steps, runs, strict=True)]
        found[choice] = {name: statistics.median(v) for name, v in (("step", steps), ("run", runs), ("rest", rest))}
    return found
