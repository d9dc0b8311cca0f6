"""One fine-tuning: a fresh copy of the base, an adapter (or all weights), so many steps, exact match."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .data import Example, Splits
from .methods import adapted

__all__ = ["Outcome", "Recipe", "Run", "batch_of", "exact_match", "fine_tune", "scheduled", "step"]

_IGNORED = -100
_CLIP = 1.0


@dataclass(frozen=True)
class Recipe:
    """What all runs share: AdamW without weight decay, a tenth of warm-up and half a cosine, gradients clipped at 1.

    Attributes:
        steps: of the optimizer.
        batch: examples.
        device: ``cpu`` or ``cuda``.
    """

    steps: int = 80
    batch: int = 16
    device: str = "cpu"


@dataclass(frozen=True)
class Run:
    """What is trained.

    Attributes:
        method: a name of `accuracy_methods.METHODS`, or ``full``.
        rank: of its adapter; 0 where there is none.
        task: its name.
        rate: the highest learning rate.
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
        parameters: that were trained.
        validation: exact match on that split, in percent.
        test: exact match on that split, in percent.
    """

    parameters: int
    validation: float
    test: float


def fine_tune(base: nn.Module, splits: Splits, run: Run, recipe: Recipe) -> Outcome:
    """Train on the split ``train``, evaluate on the others.

    Args:
        base: a causal language model; it stays as it is.
        splits: the examples of ``run.task``.
        run: method, rank, learning rate, seed.
        recipe: what all runs share.
    """
    torch.manual_seed(run.seed)
    model = adapted(copy.deepcopy(base), run.method, run.rank).to(recipe.device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run.rate, weight_decay=0.0)
    batches = _batches(splits["train"], recipe.batch, run.seed)
    for index, examples in enumerate(itertools.islice(batches, recipe.steps)):
        for group in optimizer.param_groups:
            group["lr"] = run.rate * scheduled(index, recipe.steps)
        step(model, optimizer, examples, recipe.device)
    validation, test = (exact_match(model, splits[split], recipe) for split in ("validation", "test"))
    return Outcome(sum(parameter.numel() for parameter in parameters), validation, test)


def step(model: Any, optimizer: torch.optim.Optimizer, examples: Sequence[Example], device: str) -> None:
    """One step of the optimizer, on the answers' tokens alone."""
    tokens, labels = batch_of(examples)
    model(input_ids=tokens.to(device), labels=labels.to(device), use_cache=False).loss.backward()
    nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], _CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def batch_of(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Tokens and labels [batch, length], padded on the right; only answers have labels.

    No attention mask is needed: under causal attention no token sees the padding after it.

    >>> batch_of([Example((5, 6), (7,)), Example((5,), (8,))])
    (tensor([[5, 6, 7],
            [5, 8, 0]]), tensor([[-100, -100,    7],
            [-100,    8, -100]]))
    """
    length = max(len(example.prompt) + len(example.answer) for example in examples)
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full_like(tokens, _IGNORED)
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return tokens, labels


@torch.inference_mode()
def exact_match(model: Any, examples: Sequence[Example], recipe: Recipe) -> float:
    """How many answers are right in every token, in percent.

    The model reads the right answer and predicts each token of it from those before. If the likeliest token is right
    every time, greedy generation writes the same answer, and the other way round: up to the first error both read the
    same.

    Args:
        model: a causal language model; left in eval mode.
        examples: at least one.
        recipe: device, and the batch; two of those are evaluated at once.
    """
    model.eval()
    right = 0
    for start in range(0, len(examples), 2 * recipe.batch):
        tokens, labels = batch_of(examples[start : start + 2 * recipe.batch])
        predicted = model(input_ids=tokens.to(recipe.device), use_cache=False).logits[:, :-1].argmax(-1).cpu()
        right += int(((predicted == labels[:, 1:]) | (labels[:, 1:] == _IGNORED)).all(-1).sum())
    return 100 * right / len(examples)


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
