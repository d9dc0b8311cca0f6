"""An encoder on ONNX Runtime."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from flora_fx.errors import ExportError

from ..directory.manifest import Manifest
from .session import Session

__all__ = ["Encoder"]


class Encoder:
    """An exported encoder. Make one with `flora_fx.export.load`.

    Attributes:
        manifest: what was exported.
        session: where it runs; ``session.provider`` names the execution provider.
    """

    def __init__(self, session: Session, manifest: Manifest) -> None:
        self.session = session
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"Encoder({self.manifest.architecture}, {self.manifest.dtype}, {self.session.provider})"

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Encode a batch.

        Args:
            inputs: by the names of ``manifest.inputs``, as the transformers model takes them: ``input_ids``
                [batch, seq], ``pixel_values`` [batch, channels, height, width], ... A missing ``attention_mask`` is
                all ones, missing ``token_type_ids`` are all zeros.

        Returns:
            The model's outputs by name, for instance ``last_hidden_state`` [batch, seq, hidden].

        Raises:
            TypeError, ValueError: an input is missing, unknown, or of the wrong dtype or shape.
            ExportError: ONNX Runtime fails.
        """
        if unknown := inputs.keys() - self.session.inputs.keys():
            raise TypeError(f"unknown input {', '.join(sorted(unknown))}; this encoder takes {self._names()}")
        filled = {name: self._checked(name, value) for name, value in inputs.items()}
        ids = filled.get("input_ids")
        if ids is not None:
            if "attention_mask" in self.session.inputs:
                filled.setdefault("attention_mask", torch.ones_like(ids))
            if "token_type_ids" in self.session.inputs:
                filled.setdefault("token_type_ids", torch.zeros_like(ids))
        if missing := self.session.inputs.keys() - filled.keys():
            raise TypeError(f"input {', '.join(sorted(missing))} is missing; this encoder takes {self._names()}")
        sizes: dict[str, tuple[str, int]] = {}
        for name, value in filled.items():
            for axis, size in zip(self.session.inputs[name][0], value.shape, strict=True):
                if isinstance(axis, str) and sizes.setdefault(axis, (name, size))[1] != size:
                    other, expected = sizes[axis]
                    raise ValueError(
                        f"{name} has shape {list(value.shape)}; its {axis} must be {expected}, as in {other}"
                    )
        return self.session.run(filled)

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Encoders do not generate.

        Raises:
            ExportError: always.
        """
        raise ExportError(f"{self.manifest.architecture} is an encoder: call it; only a causal LM generates")

    stream = generate

    def _names(self) -> str:
        return ", ".join(self.manifest.inputs)

    def _checked(self, name: str, value: Any) -> Tensor:
        shape, dtype = self.session.inputs[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor")
        if value.is_floating_point() != dtype.is_floating_point or value.is_complex():
            raise TypeError(f"{name} has dtype {value.dtype}; it must be {dtype}")
        fits = value.dim() == len(shape) and all(
            not isinstance(wanted, int) or wanted == size for wanted, size in zip(shape, value.shape, strict=True)
        )
        if not fits or value.numel() == 0:
            raise ValueError(f"{name} has shape {list(value.shape)}; it must be [{', '.join(map(str, shape))}]")
        return value.detach().to("cpu", dtype)
