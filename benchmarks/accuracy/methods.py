"""The methods that are compared, by name, and the rank that each gets for a budget of trainable parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from flora_fx.errors import AdapterError

from .beginnings import leading, orthonormal

__all__ = [
    "FULL",
    "LORA",
    "METHODS",
    "VARIANTS",
    "Contestant",
    "adapted",
    "contestants",
    "family",
    "gained",
    "rate_ratio",
]

FULL, LORA = "full", "LoRA"


@dataclass(frozen=True)
class _Method:
    """An adapter and how it is trained.

    Attributes:
        configurations: PEFT's, by the rank; several are active at once.
        ratio: the learning rate of B over that of A.
        gains: whether each B is multiplied by a number that is learned, too. It is a factor of B when training is over.
        begin: makes the weights of an adapted model begin otherwise than its configuration says.
    """

    configurations: Callable[[int], Sequence[Any]]
    ratio: float = 1.0
    gains: bool = False
    begin: Callable[[Any], None] | None = None


_ATTENTION = r".*\.(self_attn|attention)\..*(_proj|query|key|value|dense)"
_MLP = r".*\.(mlp\.\w+_proj|\d+\.(intermediate|output)\.dense)"


def _lora(targets: str = "all-linear", *, twice: str = "", **form: Any) -> _Method:
    """LoRA.

    Args:
        targets: which modules.
        twice: a pattern of modules that get twice the rank.
        form: fields of its configuration.
    """

    def configurations(rank: int) -> Sequence[Any]:
        import peft

        # In a Llama: q, k, v, o, gate, up and down.
        fields = {"lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": targets} | form
        if twice:  # of one scaling, as all are
            fields |= {"rank_pattern": {twice: 2 * rank}, "alpha_pattern": {twice: 4 * rank}}
        return [peft.LoraConfig(r=rank, **fields)]

    return _Method(configurations)


def _ffba(*forms: Mapping[str, Any], times: Sequence[int] = ()) -> _Method:
    """FFBA adapters side by side.

    Args:
        forms: fields of each configuration.
        times: how many times the rank each has; once without.
    """

    def configurations(rank: int) -> Sequence[Any]:
        from flora_fx.adapters import FloraConfig

        ranks = [rank * factor for factor in times or [1] * len(forms)]
        return [FloraConfig(r=own, **{"alpha": 2 * own, **form}) for own, form in zip(ranks, forms, strict=True)]

    return _Method(configurations)


METHODS: dict[str, _Method] = {
    LORA: _lora(),
    "block": _ffba({"placement": "block"}),
    "block, relu": _ffba({"placement": "block", "activation": "relu"}),
    "block, forward": _ffba({"placement": "block", "ends": "forward"}),
    "block, backward": _ffba({"placement": "block", "ends": "backward"}),
    "shared": _ffba({"placement": "shared"}),
    "shared, silu": _ffba({"placement": "shared", "activation": "silu"}),
    "cross": _ffba({"placement": "cross"}),
}
"""Each adapter by its name; the scaling of all of them is 2."""

_SHARED: Mapping[str, Any] = {"placement": "shared"}
_STABLE = 8.0  # alpha of rank-stabilised scaling: 5.7 at rank 2, 2.8 at rank 8

VARIANTS: dict[str, _Method] = {
    "LoRA, B ×4": replace(_lora(), ratio=4.0),
    "LoRA, B ×16": replace(_lora(), ratio=16.0),
    "LoRA, rank-stabilised": _lora(use_rslora=True, lora_alpha=_STABLE),
    "LoRA, orthogonal A": replace(_lora(), begin=orthonormal),
    "LoRA, orthogonal A, B ×4": replace(_lora(), begin=orthonormal, ratio=4.0),
    "LoRA, orthogonal A, rank-stabilised": replace(_lora(use_rslora=True, lora_alpha=_STABLE), begin=orthonormal),
    "LoRA, leading A": replace(_lora(), begin=leading),
    "LoRA, gains": replace(_lora(), gains=True),
    "LoRA, attention": _lora(_ATTENTION),
    "LoRA, attention ×2": _lora(twice=_ATTENTION),
    "LoRA, MLP": _lora(_MLP),
    "LoRA, dropout": _lora(lora_dropout=0.1),
    "shared, B ×4": replace(_ffba(_SHARED), ratio=4.0),
    "shared, B ×16": replace(_ffba(_SHARED), ratio=16.0),
    "shared, rank-stabilised": _ffba({**_SHARED, "use_rslora": True, "alpha": _STABLE}),
    "shared, orthogonal A": _ffba({**_SHARED, "init": "orthogonal"}),
    "shared, orthogonal A, B ×4": replace(_ffba({**_SHARED, "init": "orthogonal"}), ratio=4.0),
    "shared, orthogonal A, rank-stabilised": _ffba(
        {**_SHARED, "init": "orthogonal", "use_rslora": True, "alpha": _STABLE}
    ),
    "shared, leading A": _ffba({**_SHARED, "init": "svd"}),
    "shared, gains": replace(_ffba(_SHARED), gains=True),
    "shared, attention": _ffba({**_SHARED, "blocks": ["attention"]}),
    "shared, attention ×2": _ffba({**_SHARED, "blocks": ["attention"]}, {**_SHARED, "blocks": ["mlp"]}, times=(2, 1)),
    "shared, MLP": _ffba({**_SHARED, "blocks": ["mlp"]}),
    "shared, dropout": _ffba({**_SHARED, "dropout": 0.1}),
    "shared, tanh": _ffba({**_SHARED, "activation": "tanh"}),
    "shared and cross": _ffba(_SHARED, {"placement": "cross"}),
}
"""What a search tries besides: the same freedom for both, and what only FFBA has."""


def family(method: str) -> str:
    """``full``, ``LoRA`` or ``FFBA``.

    >>> family("full"), family("LoRA, B ×4"), family("shared")
    ('full', 'LoRA', 'FFBA')
    """
    return method if method == FULL else LORA if method.partition(",")[0] == LORA else "FFBA"


def rate_ratio(method: str) -> float:
    """The learning rate of B over that of A."""
    return 1.0 if method == FULL else _method(method).ratio


def _method(name: str) -> _Method:
    return METHODS[name] if name in METHODS else VARIANTS[name]


def adapted(model: Any, method: str, rank: int, task_type: str | None = None) -> Any:
    """The model as the method trains it.

    Args:
        model: a transformers model; changed.
        method: a name of `METHODS` or `VARIANTS`, or `FULL`, which trains every weight.
        rank: of the adapter.
        task_type: PEFT's word for what the model is, if that matters.
    """
    if method == FULL:
        return model.requires_grad_(True)
    import peft

    first, *others = (replace(one, task_type=task_type) for one in _method(method).configurations(rank))
    found = peft.get_peft_model(model, first)
    names = ["default", *(f"beside {index}" for index, _ in enumerate(others))]
    for name, other in zip(names[1:], others, strict=True):
        found.add_adapter(name, other)
    if others:
        found.base_model.set_adapter(names)
    if (begin := _method(method).begin) is not None:
        begin(found)
    return found


def gained(model: nn.Module, method: str) -> list[str]:
    """The names of the weights of an adapted model that a learned number multiplies: every B, or none.

    Args:
        model: what `adapted` made.
        method: its name.
    """
    if method == FULL or not _method(method).gains:
        return []
    from flora_fx.adapters import parameter_groups

    [up] = (group["params"] for group in parameter_groups(model, lr=1.0, ratio=2.0) if group["lr"] == 2)
    chosen = {id(weight) for weight in up}
    return [name for name, weight in model.named_parameters() if id(weight) in chosen]


@dataclass(frozen=True)
class Contestant:
    """A method at a budget.

    Attributes:
        budget: the rank of the LoRA whose parameters are the budget; 0 for `FULL`, which has none.
        method: its name.
        rank: the largest that the budget buys; 0 for `FULL`, and for a method that cannot take part.
        parameters: that it trains.
        unavailable: why it cannot take part: it does not fit the model.
    """

    budget: int
    method: str
    rank: int
    parameters: int
    unavailable: str = ""


def contestants(model: nn.Module, methods: Sequence[str], budgets: Sequence[int]) -> list[Contestant]:
    """Every method at every budget, and `FULL` once.

    Args:
        model: the base.
        methods: names of `METHODS` or `VARIANTS`, or `FULL`.
        budgets: ranks of LoRA.
    """
    found = [Contestant(0, FULL, 0, sum(weight.numel() for weight in model.parameters()))] if FULL in methods else []
    for budget in budgets:
        parameters = _parameters(model, LORA, budget)
        found += [_contestant(model, method, budget, parameters) for method in methods if method != FULL]
    return found


def _contestant(model: nn.Module, method: str, budget: int, parameters: int) -> Contestant:
    try:
        least = _parameters(model, method, 1)  # every rank costs as much
    except AdapterError as error:
        return Contestant(budget, method, 0, 0, str(error))
    gains = _gains(model, method)
    rank = (parameters - gains) // least
    if rank < 1:
        return Contestant(budget, method, 0, 0, f"{parameters} parameters are too few: rank 1 has {least + gains}")
    return Contestant(budget, method, rank, least * rank + gains)


def _gains(model: nn.Module, method: str) -> int:
    if not _method(method).gains:
        return 0
    return len(gained(adapted(copy.deepcopy(model), method, 1), method))


def _parameters(model: nn.Module, method: str, rank: int) -> int:
    from flora_fx.adapters import parameters_of

    return sum(parameters_of(one, model) for one in _method(method).configurations(rank))
