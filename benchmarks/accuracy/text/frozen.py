"""What an encoder knows without fine-tuning: logistic regression on its frozen features."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora_fx.measuring.method import pinned

from ..data import SPLITS, Splits
from ..journal import digest
from ..suite import Baseline
from .classification import Head, features, table
from .packed import PackedTable
from .upper import States

__all__ = ["fitted", "regression"]

_PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_BATCH = 32


def fitted(encoder: nn.Module, states: States, splits: Splits, folder: Path, identity: object) -> tuple[Head, Baseline]:
    """The head, and how good it is.

    Args:
        encoder: the frozen base.
        states: what it begins with, by the tokens of a text.
        splits: examples of one task.
        folder: heads are kept in a folder in it: each is computed once.
        identity: what it depends on besides the examples.
    """
    file = folder / "accuracy-heads" / f"{digest([identity, dict(splits), _PENALTIES, torch.__version__])}.json"
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Head(torch.tensor(kept["weight"]), torch.tensor(kept["bias"])), Baseline(**kept["baseline"])
    with pinned(1):  # sums do not depend on the number of cores
        tables = {
            split: table([states[one.prompt] for one in splits[split]], [one.answer[0] for one in splits[split]])
            for split in SPLITS
        }
        found = {split: _features(encoder, tables[split]) for split in SPLITS}
        head, baseline = _best(found, {split: tables[split].whole[0] for split in SPLITS})
    kept = {"weight": head.weight.tolist(), "bias": head.bias.tolist(), "baseline": asdict(baseline)}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(kept), encoding="utf-8")
    unfinished.rename(file)
    return head, baseline


def regression(features: Tensor, labels: Tensor, penalty: float) -> Head:
    """Logistic regression.

    Args:
        features: [examples, hidden].
        labels: [examples], from zero on.
        penalty: on the mean square of the weights.
    """
    features = features.double()
    count = int(labels.max()) + 1
    weight = torch.zeros(count, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return Head(weight.detach().float(), bias.detach().float())


def _best(found: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> tuple[Head, Baseline]:
    heads = [regression(found["train"], labels["train"], penalty) for penalty in _PENALTIES]
    right = [_percent(head, found["validation"], labels["validation"]) for head in heads]
    head, validation = heads[right.index(max(right))], max(right)
    [(usual, _)] = Counter(labels["train"].tolist()).most_common(1)
    majority = 100 * (labels["test"] == usual).double().mean().item()
    test = _percent(head, found["test"], labels["test"])
    return head, Baseline(len(head.bias), majority, validation, test)


def _percent(head: Head, features: Tensor, labels: Tensor) -> float:
    return 100 * (F.linear(features, head.weight, head.bias).argmax(-1) == labels).double().mean().item()


@torch.inference_mode()
def _features(encoder: nn.Module, texts: PackedTable) -> Tensor:
    encoder.eval()
    found = []
    for index in torch.arange(len(texts)).split(_BATCH):
        states, owner, _ = texts.rows(index)
        found.append(features(encoder, states, owner, len(index)))
    return torch.cat(found)
