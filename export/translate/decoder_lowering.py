"""A decoder's operators as nodes of ``com.microsoft``, and its norms as ONNX Runtime's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import functional
from torch.onnx.ops import symbolic, symbolic_multi_out

from flora_fx.decoder_ops import rotary_rows  # noqa: F401  registers the operators
from flora_fx.quantized.weight import CODEBOOKS

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["as_onnx_nodes", "fuse_norms"]


def as_onnx_nodes(program: ExportedProgram) -> ExportedProgram:
    """Replace the operators of `decoder_ops` by stand-ins for ONNX nodes. A program without them stays what it is."""
    ops = torch.ops.flora_fx
    table: dict[Any, Callable[..., Any]] = {
        ops.positions.default: _positions,
        ops.rotary_rows.default: _rotary_rows,
        ops.group_query_attention.default: _group_query_attention,
        ops.quantized_linear.default: _quantized_linear,
    }
    if not any(node.target in table for node in program.graph_module.graph.nodes):
        return program
    table[torch.ops.aten.silu.default] = _silu
    return program.run_decompositions(table)


def _positions(seqlens_k: Tensor, input_ids: Tensor) -> Tensor:
    length = input_ids.shape[1]
    past = (seqlens_k.long() + 1 - length).clamp(min=0)
    return past[:, None] + torch.arange(length, device=seqlens_k.device)


def _rotary_rows(cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
    rows = [table[position_ids] for table in (cos, sin)]
    if interleaved:
        return tuple(torch.stack([x, x], -1).flatten(-2) for x in rows)
    return tuple(torch.cat([x, x], -1) for x in rows)


def _silu(x: Tensor) -> Tensor:
    if x.dtype == torch.bfloat16:  # ONNX Runtime has no kernel of QuickGelu for it
        return x * x.sigmoid()
    return symbolic("com.microsoft::QuickGelu", [x], {"alpha": 1.0}, dtype=x.dtype, shape=x.shape, version=1)


def _quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    kind: str,
    bits: int,
    block: int,
    out_features: int,
) -> Tensor:
    """Of weights alone but for the product: what dequantizes them is computed once, as the graph is loaded."""
    columns = x.shape[-1]
    shifts = range(0, 8, bits) if kind == "affine" else (4, 0)
    whole = codes.to(torch.int32)  # torch.onnx does not shift, and masks uint8 as int8
    numbers = torch.stack([whole // 2**shift % 2**bits for shift in shifts], -1)
    numbers = numbers.reshape(scales.numel(), -1)[:, :block]
    if kind == "affine":
        zero = 2.0 ** (bits - 1) if zeros is None else zeros.to(torch.float32).reshape(-1, 1)
        values = numbers.to(torch.float32) - zero
    else:
        book = torch.cat([scales.new_full((1,), value, dtype=torch.float32) for value in CODEBOOKS[kind]])
        values = book[numbers.to(torch.int64)]
    values = values * scales.to(torch.float32).reshape(-1, 1)
    weight = values.reshape(out_features, -1)[:, :columns]
    if order is not None:
        weight = weight.index_select(1, order.argsort())
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _group_query_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    seqlens_k: Tensor,
    total: int,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    window: int,
    softcap: float,
    interleaved: bool,
) -> tuple[Tensor, ...]:
    attributes: dict[str, Any] = {
        "num_heads": num_heads,
        "kv_num_heads": kv_num_heads,
        "scale": scale,
        "local_window_size": window,
        "softcap": softcap,
        "do_rotary": int(cos is not None),
        "rotary_interleaved": int(interleaved),
    }
    length = torch.scalar_tensor(total, dtype=torch.int32)
    batch, seq, dim = query.shape[0], query.shape[1], past_key.shape[3]
    cache = (batch, kv_num_heads, total, dim)
    return tuple(
        symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            [query, key, value, past_key, past_value, seqlens_k, length, cos, sin],
            attributes,
            dtypes=[query.dtype, past_key.dtype, past_value.dtype],
            shapes=[(batch, seq, num_heads * dim), cache, cache],
            version=1,
        )
    )


def fuse_norms(model: onnx_ir.Model) -> None:
    """RMS norms, and the residual additions in front of them, as one node each."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
    from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
    from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_rms_normalization

    CommonSubexpressionEliminationPass()(model)
    fuse_rms_normalization(model)
    fuse_skip_rms_normalization(model)
    RemoveUnusedNodesPass()(model)
