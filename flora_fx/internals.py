"""What is imported of torch's private modules, in one place: seen in torch 2.11.0, 2.13.0 and 2.14.1.

Where a release moves one of these, this file changes and no other. `docs/compatibility.md` says what was measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "GELU",
    "SET_GRAD_ENABLED",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "compiler",
    "enable_python_dispatcher",
    "exporter",
    "guard_requires_grad",
    "inductor",
    "is_export_check",
    "pytree",
    "statically_known_true",
    "unset_fake_temporarily",
]

GELU: Any = torch._C._nn.gelu
"""What `torch.nn.functional.gelu` is in C; some traces call it."""
SET_GRAD_ENABLED: Any = torch._C._set_grad_enabled
"""What Dynamo writes where ``torch.no_grad()`` begins and ends."""


def compiler(backend: str) -> Callable[..., Any]:
    """A backend of `torch.compile` by its name.

    Args:
        backend: its name.
    """
    from torch._dynamo.backends.registry import lookup_backend  # Dynamo is loaded where it is used

    found: Callable[..., Any] = lookup_backend(backend)
    return found


def statically_known_true(condition: Any) -> bool:
    """Whether a comparison of sizes holds for every size that a graph is for; False where that is not known.

    Args:
        condition: a bool, or torch's symbolic one.
    """
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental import symbolic_shapes  # brings sympy, a third of torch's own import

    return symbolic_shapes.statically_known_true(condition)


def inductor(mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    """Inductor, as `torch.compile` calls it.

    Args:
        mode: of `torch.compile`.
        options: of `torch.compile`.
    """
    found: Callable[..., Any] = torch._TorchCompileInductorWrapper(mode, options, None)
    return found


def exporter() -> ModuleType:
    """The module that traces for `torch.export`; where it fails it prints the graph that it has."""
    from torch.export import _trace

    return _trace


def guard_requires_grad() -> None:
    """Let Dynamo see that a parameter's ``requires_grad`` has changed, where gradients are recorded.

    The guards of torch 2.11 skip the parameters of a module that no parameter was added to or taken from, so that
    gradients go missing with every backend; torch 2.13's do not. The setting is torch's own, and stays: it is read when
    the guards are made, after the backend has returned. It makes them slower, so inference does without.
    """
    if torch.__version__ < "2.13":
        torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False


def is_export_check(hook: Callable[..., Any]) -> bool:
    """Whether a hook is what `torch.export` calls before a graph module: it refuses inputs of other sizes."""
    module = sys.modules.get("torch.export._unlift")  # whoever made such a graph has loaded it
    return module is not None and hook is getattr(module, "_check_input_constraints_pre_hook", None)
