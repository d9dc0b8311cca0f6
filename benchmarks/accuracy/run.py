"""One fine-tuning: a fresh copy of the base, an adapter (or all weights), so many steps, what is right then."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .data import Example, Splits
from .methods import adapted, rate_ratio
from .recipe import Recipe
from .suite import Learner

__all__ = ["Outcome", "Run", "fine_tune", "percent_right", "scheduled", "step"]

_CLIP = 1.0


@dataclass(frozen=True)
class Run:
    """What is trained.

    Attributes:
        method: a name of `methods.METHODS` or `methods.VARIANTS`, or ``full``.
        rank: of its adapter; 0 where there is none.
        task: its name.
        rate: the highest learning rate; of A and B the geometric mean, where they have two.
        seed: of the adapter's weights and of the order of examples, which is the same for all methods.
    """

    method: str
    rank: int
    task: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        parameters: of the adapter, or of the base if that was trained.
        validation: what is right on that split, in percent.
        test: what is right on that split, in percent.
        seconds: of a CPU core.
    """

    parameters: int
    validation: float
    test: float
    seconds: float = field(default=0.0, compare=False)


def fine_tune(learner: Learner, base: nn.Module, splits: Splits, run: Run, recipe: Recipe) -> Outcome:
    """Train on the split ``train``, evaluate on the others.

    Args:
        learner: of the suite.
        base: what it loads; stays as it is.
        splits: the examples of ``run.task``.
        run: method, rank, learning rate, seed.
        recipe: what all runs share.
    """
    began = time.process_time()
    torch.manual_seed(run.seed)
    body = adapted(copy.deepcopy(base), run.method, run.rank, learner.task_type)
    model = learner.model(body, run.task).to(recipe.device).train()
    groups = _groups(model, body, run, learner.head_rate)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    highest = [group["lr"] for group in optimizer.param_groups]
    batches = _batches(splits["train"], recipe.batch, run.seed)
    for index, examples in enumerate(itertools.islice(batches, recipe.steps)):
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * scheduled(index, recipe.steps)
        step(optimizer, learner.loss(model, examples, recipe.device))
    validation, test = (percent_right(learner, model, splits[split], recipe) for split in ("validation", "test"))
    parameters = sum(parameter.numel() for parameter in body.parameters() if parameter.requires_grad)
    return Outcome(parameters, validation, test, time.process_time() - began)


def _groups(model: nn.Module, body: nn.Module, run: Run, head_rate: float) -> list[dict[str, Any]]:
    """The body's weights at the rate of the run, what the suite put onto it at a rate of its own."""
    from flora_fx.adapters import parameter_groups

    ratio = rate_ratio(run.method)
    groups = parameter_groups(body, lr=run.rate / math.sqrt(ratio), ratio=ratio)
    ours = {id(parameter) for parameter in body.parameters()}
    head = [parameter for parameter in model.parameters() if id(parameter) not in ours]
    return groups + ([{"params": head, "lr": head_rate}] if head else [])


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of the optimizer down a loss."""
    loss.backward()
    nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], _CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.inference_mode()
def percent_right(learner: Learner, model: nn.Module, examples: Sequence[Example], recipe: Recipe) -> float:
    """How many of the examples are answered right, in percent.

    Args:
        learner: of the suite.
        model: left in eval mode.
        examples: at least one.
        recipe: device, and the batch; two of those are evaluated at once.
    """
    model.eval()
    size = 2 * recipe.batch
    batches = (examples[start : start + size] for start in range(0, len(examples), size))
    return 100 * sum(learner.right(model, batch, recipe.device) for batch in batches) / len(examples)


def scheduled(index: int, steps: int) -> float:
    """The learning rate's factor: up over the first tenth, then half a cosine down.

    >>> [round(scheduled(index, 20), 2) for index in (0, 1, 2, 11, 19)]
    [0.5, 1.0, 1.0, 0.5, 0.01]
    """
    warm_up = max(1, steps // 10)
    if index < warm_up:
        return (index + 1) / warm_up
    return (1 + math.cos(math.pi * (index - warm_up) / (steps - warm_up))) / 2


def _batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """All examples in a random order, again and again, in batches of one size."""
    drawn = torch.Generator().manual_seed(seed)
    passes = (torch.randperm(len(examples), generator=drawn).tolist() for _ in itertools.count())
    order = itertools.chain.from_iterable(passes)
    while True:
        yield [examples[index] for index in itertools.islice(order, size)]
