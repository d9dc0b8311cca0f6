"""The operators that a decoder's trace holds where the model computes attention, as ONNX Runtime will compute it.

They run in PyTorch, in any dtype, so that a rewritten program can be compared with its model before it is translated:

    positions               seqlens_k -> position of every token
    rotary_rows             position -> cos, sin
    group_query_attention   ``com.microsoft::GroupQueryAttention``
                            https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

Each row of a batch is contiguous in the cache: a prompt is padded on the right, and what it left behind its end is
written over by its next tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["group_query_attention", "positions", "rotary_rows", "rotate"]


@torch.library.custom_op("flora_fx::positions", mutates_args=())
def positions(seqlens_k: Tensor, input_ids: Tensor) -> Tensor:
    """[batch], one less than the tokens of each row -> the position of each token of ``input_ids`` [batch, seq]."""
    length = input_ids.shape[1]
    past = (seqlens_k.long() + 1 - length).clamp(min=0)  # shorter rows of a prompt begin at 0 as well
    return past[:, None] + torch.arange(length, device=seqlens_k.device)


@positions.register_fake
def _(seqlens_k: Tensor, input_ids: Tensor) -> Tensor:
    return torch.empty_like(input_ids, dtype=torch.int64)


@torch.library.custom_op("flora_fx::rotary_rows", mutates_args=())
def rotary_rows(cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Rows of two tables [positions, dim / 2], each number twice: [batch, seq, dim]."""
    return tuple(_twice(table[position_ids], interleaved) for table in (cos, sin))  # type: ignore[return-value]


@rotary_rows.register_fake
def _(cos: Tensor, sin: Tensor, position_ids: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    shape = (*position_ids.shape, 2 * cos.shape[1])
    return cos.new_empty(shape), sin.new_empty(shape)


def _twice(rows: Tensor, interleaved: bool) -> Tensor:
    return rows.repeat_interleave(2, -1) if interleaved else torch.cat([rows, rows], -1)


@torch.library.custom_op("flora_fx::group_query_attention", mutates_args=())
def group_query_attention(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of new tokens to those in the cache and to each other.

    Args:
        query: [batch, seq, num_heads · dim]; without key and value, those follow in the last dimension.
        key, value: [batch, seq, kv_num_heads · dim].
        past_key, past_value: [batch, kv_num_heads, past, dim].
        seqlens_k: [batch], one less than the tokens of each row, new ones included.
        total: the longest row's tokens; where it is seq, this is the first prompt.
        cos, sin: [positions, rotary / 2]; given, the first ``rotary`` numbers of each head are rotated.
        window: how many tokens each may see, itself included; -1 for all.
        softcap: c in ``c · tanh(score / c)``; 0 for none.
        interleaved: whether neighbours are rotated together, instead of the two halves.

    Returns:
        [batch, seq, num_heads · dim], and keys and values with the new ones, [batch, kv_num_heads, total, dim].
    """
    batch, length, dim = query.shape[0], query.shape[1], past_key.shape[3]
    if key is None or value is None:
        query, key, value = query.split([num_heads * dim, kv_num_heads * dim, kv_num_heads * dim], -1)
    q, k, v = (x.unflatten(-1, (-1, dim)) for x in (query, key, value))
    before = torch.zeros_like(seqlens_k) if total == length else seqlens_k + 1 - length
    at = before[:, None].long() + torch.arange(length, device=query.device)
    if cos is not None and sin is not None:
        q, k = (rotate(x, cos[at], sin[at], interleaved) for x in (q, k))
    shape = (batch, kv_num_heads, max(total, past_key.shape[2]), dim)
    keys, values = past_key.new_zeros(shape), past_value.new_zeros(shape)
    result = []
    for row in range(batch):
        start = int(before[row])
        for cache, past, new in ((keys, past_key, k), (values, past_value, v)):
            cache[row, :, :start] = past[row, :, :start]
            cache[row, :, start : start + length] = new[row].transpose(0, 1)
        scores = _by_group(q[row], kv_num_heads) @ keys[row, :, None].transpose(-1, -2) * scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        distance = at[row][:, None] - torch.arange(shape[2], device=query.device)
        seen = (distance >= 0) & (distance < window if window > 0 else True)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        result.append((weights @ values[row, :, None]).flatten(0, 1).transpose(0, 1).flatten(-2))
    return torch.stack(result), keys, values


@group_query_attention.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, dim = query.shape[0], query.shape[1], past_key.shape[3]
    shape = (batch, kv_num_heads, total, dim)
    return query.new_empty(batch, length, num_heads * dim), past_key.new_empty(shape), past_value.new_empty(shape)


def _by_group(heads: Tensor, kv_num_heads: int) -> Tensor:
    """[seq, heads, dim] -> [kv_heads, group, seq, dim]."""
    return heads.transpose(0, 1).unflatten(0, (kv_num_heads, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary positions (RoFormer, arXiv 2104.09864), on the first numbers of each head.

    Args:
        x: [..., seq, heads, dim].
        cos, sin: [..., seq, rotary / 2].
        interleaved: whether neighbours are rotated together, instead of the two halves.

    >>> x = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> rotate(x, torch.tensor([[0.0]]), torch.tensor([[1.0]]), False)
    tensor([[[-2.,  1.,  3.]]])
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    first, second = a * cos - b * sin, b * cos + a * sin
    both = torch.stack([first, second], -1).flatten(-2) if interleaved else torch.cat([first, second], -1)
    return torch.cat([both, rest], -1)
