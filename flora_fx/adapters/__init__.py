"""Fused forward-backward adapters (FFBA) for PEFT: attach, train, save, load, fuse and deploy them as any PEFT method.

    import peft, flora_fx.adapters
    model = peft.get_peft_model(model, flora_fx.adapters.FloraConfig(r=16, alpha=32, placement="shared"))

Importing this package makes the method known to PEFT: do so before `PeftModel.from_pretrained`, too.
"""

from __future__ import annotations

from flora_fx.errors import require

require("peft", "hf")

from peft.utils import register_peft_method  # noqa: E402

from .budget import parameters_of, rank_for_budget  # noqa: E402
from .config import ACTIVATIONS, FloraConfig  # noqa: E402
from .groups import parameter_groups  # noqa: E402
from .layer import FloraLayer  # noqa: E402
from .registration import PREFIX  # noqa: E402
from .tuner import FloraModel  # noqa: E402

__all__ = [
    "ACTIVATIONS",
    "FloraConfig",
    "FloraLayer",
    "FloraModel",
    "parameter_groups",
    "parameters_of",
    "rank_for_budget",
]

register_peft_method(name="flora", config_cls=FloraConfig, model_cls=FloraModel, prefix=PREFIX)
