"""The methods that are compared, by name, and the rank that each gets for a budget of trainable parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from flora_fx.errors import AdapterError

__all__ = ["FULL", "LORA", "METHODS", "Contestant", "adapted", "contestants"]

FULL, LORA = "full", "LoRA"


def _lora(rank: int) -> Any:
    import peft

    # In a Llama: q, k, v, o, gate, up and down.
    return peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _ffba(**form: Any) -> Callable[[int], Any]:
    def configuration(rank: int) -> Any:
        from flora_fx.adapters import FloraConfig

        return FloraConfig(r=rank, alpha=2 * rank, task_type="CAUSAL_LM", **form)

    return configuration


METHODS: dict[str, Callable[[int], Any]] = {
    LORA: _lora,
    "block": _ffba(placement="block"),
    "block, relu": _ffba(placement="block", activation="relu"),
    "block, forward": _ffba(placement="block", ends="forward"),
    "block, backward": _ffba(placement="block", ends="backward"),
    "shared": _ffba(placement="shared"),
    "shared, silu": _ffba(placement="shared", activation="silu"),
    "cross": _ffba(placement="cross"),
}
"""Each adapter's PEFT configuration by its rank; the scaling of all of them is 2."""


def adapted(model: Any, method: str, rank: int) -> Any:
    """The model as the method trains it.

    Args:
        model: a causal language model; changed.
        method: a name of `METHODS`, or `FULL`, which trains every weight.
        rank: of the adapter.
    """
    if method == FULL:
        return model.requires_grad_(True)
    import peft

    return peft.get_peft_model(model, METHODS[method](rank))


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
        methods: names of `METHODS`, or `FULL`.
        budgets: ranks of LoRA.
    """
    from flora_fx.adapters import parameters_of

    found = [Contestant(0, FULL, 0, sum(weight.numel() for weight in model.parameters()))] if FULL in methods else []
    for budget in budgets:
        parameters = parameters_of(_lora(budget), model)
        found += [_contestant(model, method, budget, parameters) for method in methods if method != FULL]
    return found


def _contestant(model: nn.Module, method: str, budget: int, parameters: int) -> Contestant:
    from flora_fx.adapters import parameters_of, rank_for_budget

    try:
        rank = rank_for_budget(model, METHODS[method](1), parameters=parameters)
    except AdapterError as error:
        return Contestant(budget, method, 0, 0, str(error))
    return Contestant(budget, method, rank, parameters_of(METHODS[method](rank), model))
