"""What an FFBA adapter is made of: `FloraConfig`, a PEFT configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from peft import PeftConfig

from .registration import PEFT_TYPE

__all__ = ["ACTIVATIONS", "FloraConfig"]

ACTIVATIONS = ("relu", "silu", "gelu", "tanh")
"""What may stand between A and B; each is `torch.nn.functional`'s of that name."""

Placement = Literal["block", "shared", "cross"]
Ends = Literal["both", "forward", "backward"]
Init = Literal["lora", "gaussian", "orthogonal", "svd", "random"]
BLOCKS = ("attention", "mlp")


@dataclass
class FloraConfig(PeftConfig):
    """Fused forward-backward adapters (FFBA) of rank r, for `peft.get_peft_model`.

    In a block (attention, or MLP) let x be what its first projections (q, k, v; gate, up) read, u what its last one (o;
    down) reads, and s the scaling. With ``z = activation(A·dropout(x))``, A being [r, in] and each B [out, r]:

    ============  =================================================================================================
    ``block``     ``o(u) + s·B·z``: one path beside the block, from its first projections' input to its output
    ``shared``    ``q(x) + s·B_q·z``, the same for k and v, and ``o(u) + s·B_o·z``: one A, a B for every projection
    ``cross``     ``z = activation(A·u)`` is added to the next adapted block's first projections: ``gate(x') + s·B_g·z``
    ============  =================================================================================================

    and for ``placement="block"`` only:

    ======================  =======================================================================================
    ``ends="forward"``      FFA: z is added to the first projections: only A shares a base projection's input
    ``ends="backward"``     FBA: z reads the block's input *before* its norm: only B shares a projection's output
    ======================  =======================================================================================

    These equations, and which projections they name, are our reading of the abstract of FLoRA (arXiv 2511.00050: "fuse
    the forward and backward adapters into existing projection layers", combining LoRA and parallel adapters), and of
    zFLoRA's (arXiv 2510.25784) for ``cross``: the papers' tables were not at hand.

    Args:
        r: rank.
        alpha: the scaling s is ``alpha / r``.
        use_rslora: the scaling is ``alpha / sqrt(r)`` instead (rank-stabilised, arXiv 2312.03732).
        placement: where the adapter reads and writes, as above.
        ends: which ends share a base projection, as above.
        activation: None, or one of `ACTIVATIONS`.
        blocks: ``"attention"``, ``"mlp"`` or both.
        layers: the indices of the layers to adapt; None for all.
        init: ``"lora"``: A Kaiming-uniform and B zero, as PEFT begins a LoRA; ``"gaussian"``: A normal with standard
            deviation 1/r and B zero; ``"orthogonal"``: rows of A orthonormal (columns, where r exceeds its width) and B
            zero; ``"svd"``: rows of A the leading right singular vectors of the base's weights that read what A reads,
            stacked, and B zero; ``"random"``: as ``"lora"``, and B random as well, which changes the model.
        dropout: probability, on what A reads.
        modules_to_save: other modules that train and are saved, such as a new classifier.

    Raises:
        ValueError: a field has no such value, or does not go with another one.

    >>> import flora_fx.adapters
    >>> config = flora_fx.adapters.FloraConfig(r=16, alpha=32, placement="shared", task_type="CAUSAL_LM")
    >>> config.scaling, config.peft_type.value
    (2.0, 'FLORA')
    """

    r: int = 8
    alpha: float = 8
    use_rslora: bool = False
    placement: Placement = "block"
    ends: Ends = "both"
    activation: str | None = None
    blocks: list[str] = field(default_factory=lambda: list(BLOCKS))
    layers: list[int] | None = None
    init: Init = "lora"
    dropout: float = 0.0
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self._check()
        self.blocks = list(self.blocks)
        self.layers = None if self.layers is None else list(self.layers)
        # PEFT's tuners look here for names of modules: found per model, and not saved.
        self.target_modules: frozenset[str] = frozenset()
        self.target_parameters = None

    @property
    def scaling(self) -> float:
        """What ``B·z`` is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def _check(self) -> None:
        hints = get_type_hints(type(self))
        choices: dict[str, tuple[Any, ...]] = {
            name: get_args(hints[name]) for name in ("placement", "ends", "init")
        } | {"activation": (None, *ACTIVATIONS)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"FloraConfig.{name} is {getattr(self, name)!r}; it must be one of {_list(allowed)}")
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f"FloraConfig.r is {self.r!r}; it must be a positive whole number")
        if not _is_number(self.alpha) or not math.isfinite(self.alpha) or self.alpha == 0:
            raise ValueError(f"FloraConfig.alpha is {self.alpha!r}; it must be a number other than zero")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"FloraConfig.dropout is {self.dropout!r}; it must be at least 0 and less than 1")
        if not _is_list(self.blocks) or not self.blocks or any(block not in BLOCKS for block in self.blocks):
            raise ValueError(f"FloraConfig.blocks is {self.blocks!r}; it must list some of {_list(BLOCKS)}")
        listed = self.layers is None or _is_list(self.layers)
        if not listed or self.layers == [] or any(type(i) is not int or i < 0 for i in self.layers or ()):
            raise ValueError(f"FloraConfig.layers is {self.layers!r}; it must list indices of layers, or be None")
        if self.init == "svd" and self.ends == "backward":
            raise ValueError(
                "FloraConfig(init='svd', ends='backward'): no weight reads what A reads there, before the norm; use "
                "init='orthogonal'"
            )
        if self.ends != "both" and self.placement != "block":
            raise ValueError(
                f"FloraConfig(ends={self.ends!r}, placement={self.placement!r}): one end alone is defined for "
                "placement='block' only"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple | set | frozenset | range)


def _list(values: tuple[Any, ...]) -> str:
    return ", ".join(map(repr, values))
