"""The fused forms for ONNX Runtime, as they were measured: by target and use."""

from __future__ import annotations

from dataclasses import replace

from flora_fx.config import FuseConfig

__all__ = ["DECODER_FORMS", "ONNX_FORMS", "OPERATOR_FORMS", "SWAPPABLE_FORMS", "stacked_forms"]

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


def stacked_forms(forms: FuseConfig, provider: str) -> FuseConfig:
    """Those where several LoRAs stand in a graph, side by side.

    The zeros of a block-diagonal B are as many times more as there are LoRAs. On a GPU they cost less than the launches
    that they save; on a CPU each projection has a B of its own (8 of rank 16, 4 layers as SmolLM-135M's, batch 8:
    3 to 8% less CPU time a token, 8 to 10% where they can be replaced).

    Args:
        forms: where there is one.
        provider: what the graph will run on.
    """
    return replace(SWAPPABLE_FORMS, up="per_projection") if provider == "CPUExecutionProvider" else forms
