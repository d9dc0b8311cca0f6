"""The fused forms for ONNX Runtime, as they were measured: by target and use."""

from __future__ import annotations

from dataclasses import replace

from flora_fx.config import FuseConfig

from .trace.capture import Target

__all__ = ["DECODER_FORMS", "ONNX_FORMS", "forms_for"]

ONNX_FORMS = FuseConfig(layout="beside", up="per_projection", accumulate="add", fold_scale=True)
"""Of the general target: each projection is read on its own."""

DECODER_FORMS = FuseConfig(layout="ahead", up="block_diagonal", accumulate="add", fold_scale=True, pack_base=True)
"""Of the target ``"decoder"``: q, k and v are read as one."""


def forms_for(target: Target, *, hot_swap: bool) -> FuseConfig:
    """The forms to write.

    ``[W, B] [x; z]`` has the fewest nodes and is the fastest. But ONNX Runtime's CPU kernels pre-pack constant weights
    and multiply slowly by others, and an input that holds W as well would have to be there twice: a B that may be
    replaced stands alone.

    Args:
        target: of the export.
        hot_swap: whether the adapter may be replaced.
    """
    if target == "general":
        return ONNX_FORMS
    return replace(DECODER_FORMS, layout="beside") if hot_swap else DECODER_FORMS
