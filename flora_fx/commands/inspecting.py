"""`flora-fx inspect`: what would fuse, what would not, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_fx.errors import CaptureError, FloraError, require
from flora_fx.tasks import Task

from .leaving_out import leave_out
from .quiet import quiet
from .stages import staged_work

if TYPE_CHECKING:
    import torch

    from flora_fx.reporting.fusion_report import FusionReport

__all__ = ["inspect", "read_inputs"]


def inspect(model: str, adapter: str, task: Task = "auto", inputs: Path | None = None) -> FusionReport:
    """Capture and fuse a checkpoint on inputs from a file, or made up: which ones does not matter to what fuses.

    Args:
        model, adapter: directory or Hub id of each.
        task: what the model is for.
        inputs: a safetensors file of tensors by name; None to make them up.

    Raises:
        FloraError: the checkpoint or the inputs cannot be read, or the model cannot be captured.
    """
    leave_out(model, [adapter])
    quiet()
    with staged_work(3) as stages:
        stages.begin("load")
        import torch

        import flora_fx
        from flora_fx.checkpoint import load_model

        from .sample_inputs import sample_inputs

        loaded: Any = load_model(model, adapter, task=task)
        for config in (loaded.config, loaded.config.get_text_config()):
            config.use_cache = False  # a KV cache would only add outputs to the graph
        stages.begin("capture")
        try:
            named: dict[str, Any] = sample_inputs(loaded) if inputs is None else read_inputs(inputs, loaded.dtype)
            with torch.no_grad():
                graph = flora_fx.capture(loaded, **named)
        except CaptureError as error:
            remedy = (
                "The inputs were made up; pass your own: --inputs FILE, written by "
                "safetensors.torch.save_file({name: tensor})"
                if inputs is None
                else f"Give it inputs that the model itself accepts; they were read from --inputs {inputs}"
            )
            raise FloraError(f"{str(error).partition('Remedy:')[0].strip().rstrip('.')}. {remedy}") from error
        stages.begin("fuse")
        return flora_fx.report(flora_fx.fuse(graph))


def read_inputs(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors by name; floats in the dtype of the model.

    Args:
        path: of a safetensors file.
        dtype: of the model.

    Raises:
        FloraError: it is none.
        OSError: it cannot be read.
    """
    safetensors = require("safetensors.torch", "hf")
    try:
        found: dict[str, torch.Tensor] = safetensors.load(path.read_bytes())
    except Exception as error:  # a SafetensorError, or what its parser raises
        if isinstance(error, OSError):
            raise
        raise FloraError(
            f"{path} is no safetensors file ({error}); write it with safetensors.torch.save_file({{name: tensor}})"
        ) from error
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in found.items()}
