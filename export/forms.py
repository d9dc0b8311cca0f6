"""The fused forms for ONNX Runtime, as they were measured: by target and use."""

from __future__ import annotations

from dataclasses import replace

from flora_fx.config import FuseConfig

__all__ = ["DECODER_FORMS", "ONNX_FORMS", "OPERATOR_FORMS", "SWAPPABLE_FORMS"]

ONNX_FORMS = FuseConfig(layout="beside", up="per_projection", accumulate="add", fold_scale=True)
"""Where attention is plain operators: each projection is read on its own."""

DECODER_FORMS = FuseConfig(layout="ahead", up="block_diagonal", accumulate="add", fold_scale=True, pack_base=True)
"""Of the target ``"decoder"``: q, k and v are read as one."""

OPERATOR_FORMS = replace(DECODER_FORMS, layout="joined")
"""The same in the operators of ``flora_ort``, which take ``[W; A] x`` as it is."""

SWAPPABLE_FORMS = replace(DECODER_FORMS, layout="beside")
"""The same, where the adapter may be replaced.

``[W, B] [x; z]`` has the fewest nodes and is the fastest. But ONNX Runtime's CPU kernels pre-pack constant weights and
multiply slowly by others, and an input that holds W as well would have to be there twice: a B that may be replaced
stands alone.
"""
