"""The operations of fused graphs that torch has no name for: a packed projection that trains, and an accumulation.

    y = linear(x, pack)                    one GEMM for all members of a pack
    dx = dy @ pack                         one GEMM back
    dW_i = dy[:, rows_i]ᵀ @ x              for the members that require gradients; the others have no gradient at all

So the gradient mask is by construction: a frozen member gets neither a gradient nor an optimizer state nor a decay.
The members themselves are arguments: that is how autograd knows where the gradients belong, and how it notices a member
that was changed between a forward and its backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from .errors import TieError

__all__ = [
    "Kind",
    "accumulate",
    "accumulate_reference",
    "accumulate_unrolled",
    "autocasts",
    "hold",
    "matrix_vector",
    "packed_projection",
    "packed_projection_reference",
    "pick_columns",
]


Rows = tuple[int, int, bool]
"""The place of a member in its pack: first row, the row after its last, and whether its transpose stands there."""

Kind = tuple[torch.dtype, bool]
"""A tensor's dtype, and whether it has no dimensions: such a number promotes no tensor."""


def accumulate(y: Tensor, z: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """``y + scale · z @ upᵀ`` as one accumulating GEMM (``addmm``): no extra elementwise kernel.

    Args:
        y: [..., out], any strides.
        z: [..., rank], as many rows as y.
        up: [out, rank], an up-projection or several in one (block-diagonal) matrix.
        scale: the adapter's scaling.

    Returns:
        [..., out], contiguous, y's dtype. y is left as it was.

    >>> y, z, up = torch.ones(2, 5, 3), torch.ones(2, 5, 4), torch.ones(3, 4)
    >>> accumulate(y, z, up, 0.5)[0, 0].tolist()
    [3.0, 3.0, 3.0]
    """
    if has_torch_function((y, z, up)):  # a symbolic trace keeps this as one node
        return handle_torch_function(accumulate, (y, z, up), y, z, up, scale)
    if y.dim() == 2 and z.dim() == 2:
        return torch.addmm(y, z, up.t(), alpha=scale)
    rows = torch.addmm(y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1]), up.t(), alpha=scale)
    return rows.view(y.shape)


def accumulate_reference(y: Tensor, z: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """`accumulate` as an adapter's author writes it: the oracle of its tests.

    >>> y, z, up = torch.randn(7, 3), torch.randn(7, 2), torch.randn(3, 2)
    >>> torch.testing.assert_close(accumulate(y, z, up, 0.3), accumulate_reference(y, z, up, 0.3))
    """
    return y + (z.reshape(*y.shape[:-1], z.shape[-1]) @ up.transpose(0, 1)) * scale


def accumulate_unrolled(y: Tensor, z: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """`accumulate` as a product and a sum over the rank: a compiler joins it with the kernel that reads the result.

    It is computed in float32 where y has a smaller dtype, and cast once, with the sum. The gradients are GEMMs.

    Args:
        y: [..., out], any strides.
        z: [..., rank], as many rows as y.
        up: [out, rank]; fast where it is the transpose of a contiguous [rank, out]. Or [..., out, rank], one for each
            token, as `pick_columns` gives it.
        scale: the adapter's scaling.

    Returns:
        [..., out], y's dtype.

    >>> y, z, up = torch.randn(2, 5, 3), torch.randn(2, 5, 4), torch.randn(3, 4)
    >>> torch.testing.assert_close(accumulate_unrolled(y, z, up, 0.5), accumulate_reference(y, z, up, 0.5))
    """
    if has_torch_function((y, z, up)):
        return handle_torch_function(accumulate_unrolled, (y, z, up), y, z, up, scale)
    if up.dim() == 2 and torch.is_grad_enabled() and (y.requires_grad or z.requires_grad or up.requires_grad):
        result: Tensor = _Unrolled.apply(y, z, up, scale)
        return result
    return _unrolled(y, z, up, scale)


def _unrolled(y: Tensor, z: Tensor, up: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    low = z.reshape(*y.shape[:-1], 1, z.shape[-1])
    return (y + scale * (low.to(wide) * up.to(wide)).sum(-1)).to(y.dtype)


def pick_columns(up: Tensor, columns: Tensor, there: Tensor) -> Tensor:
    """For each token the columns of a matrix that are its own.

    Args:
        up: [out, columns], up-projections beside each other; fast where it is the transpose of a contiguous matrix.
        columns: [..., rank], int64.
        there: [..., rank], bool: whether the token has such a column at all.

    Returns:
        [..., out, rank], zero where there is none, whatever stands in the matrix.

    >>> up = torch.tensor([[1.0, 2.0, 3.0]])
    >>> pick_columns(up, torch.tensor([[1, 2], [0, 0]]), torch.tensor([[True, True], [True, False]])).tolist()
    [[[2.0, 3.0]], [[1.0, 0.0]]]
    """
    if has_torch_function((up, columns, there)):
        return handle_torch_function(pick_columns, (up, columns, there), up, columns, there)
    return torch.where(there.unsqueeze(-2), up.t()[columns].transpose(-1, -2), 0)


def matrix_vector(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weightᵀ + bias`` for one row, as a product and a sum: where a compiler makes one loop of both.

    Args:
        x: [..., in], one row.
        weight: [out, in].
        bias: [out] or None.

    Returns:
        [..., out].

    >>> x, weight = torch.randn(1, 1, 6), torch.randn(5, 6)
    >>> torch.testing.assert_close(matrix_vector(x, weight), F.linear(x, weight))
    """
    y = (x.unsqueeze(-2) * weight).sum(-1)
    return y if bias is None else y + bias


def hold(
    inputs: Sequence[Tensor],
    kinds: Sequence[Kind],
    weights: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    others: Sequence[Tensor],
    default: torch.dtype,
) -> None:
    """Check that a captured graph is run as it was captured: the casts that did nothing then are not in it.

    Args:
        inputs: of floating-point or complex dtypes.
        kinds: what each of them was.
        weights: of floating-point or complex dtypes.
        dtypes: what each of them had.
        others: inputs and weights of other dtypes: they may have any that is no floating-point or complex one.
        default: what `torch.get_default_dtype` was.

    Raises:
        TieError: a value has another dtype, a number is a tensor of several or the other way round, or autocast is on.

    >>> hold([torch.ones(2, 3)], [(torch.float32, False)], [], [], [], torch.float32)
    """
    every = (*inputs, *weights, *others)
    if has_torch_function(every):
        handle_torch_function(hold, every, inputs, kinds, weights, dtypes, others, default)
        return
    found = [(value.dtype, value.dim() == 0) for value in inputs]
    for own, kind in zip(found, kinds, strict=True) if found != kinds else ():
        if own != kind:
            raise TieError(f"an input of a captured graph is {_told(own)} and was {_told(kind)}. {_ANEW}")
    own_dtypes = [weight.dtype for weight in weights]
    if own_dtypes != dtypes:
        own_dtype, dtype = next(pair for pair in zip(own_dtypes, dtypes, strict=True) if pair[0] != pair[1])
        raise TieError(f"a weight of a captured graph is of {own_dtype} and was of {dtype}. {_ANEW}")
    if any(value.is_floating_point() or value.is_complex() for value in others):
        raise TieError(f"an input of a captured graph is of a floating-point dtype and was not. {_ANEW}")
    if torch.get_default_dtype() != default:
        raise TieError(f"torch's default dtype is {torch.get_default_dtype()} and was {default}. {_ANEW}")
    for value in (*inputs[:1], *weights[:1]):
        if autocasts(value.device.type):
            raise TieError(f"autocast is on, and the graph was captured without. {_ANEW}")


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a kind of device, if there is one for it.

    >>> autocasts("cpu"), autocasts("meta")
    (False, False)
    """
    return kind in _AUTOCASTS and torch.is_autocast_enabled(kind)


_KINDS = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "maia", "xla")
# Asked once: Dynamo of torch 2.11 cannot trace the question.
_AUTOCASTS = frozenset(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))

_ANEW = "Give it what it was captured with, or capture and fuse anew."


def _told(kind: Kind) -> str:
    return f"{'a number' if kind[1] else 'a tensor'} of {kind[0]}"


def packed_projection(x: Tensor, pack: Tensor, bias: Tensor | None, rows: Sequence[Rows], *members: Tensor) -> Tensor:
    """``x @ packᵀ + bias``, with the gradients of the pack's members.

    Args:
        x: [..., in].
        pack: [out, in], which the members' values are in already.
        bias: [out] or None.
        rows: where each member stands.
        members: the parameters, in the same order, matrices and biases (of one dimension); those that require
            gradients get them.

    Returns:
        [..., out]. Under autocast it computes in the autocast dtype, as `torch.nn.functional.linear` does.

    The backward can't be differentiated again: torch says so when it is tried.

    >>> w, a = torch.randn(4, 3), torch.randn(2, 3, requires_grad=True)
    >>> x, pack = torch.randn(5, 3), torch.cat([w, a.detach()])
    >>> y = packed_projection(x, pack, None, [(0, 4, False), (4, 6, False)], w, a)
    >>> y.sum().backward()
    >>> torch.testing.assert_close(a.grad, x.sum(0).expand(2, 3))
    """
    if has_torch_function((x, pack, *members)):
        return handle_torch_function(packed_projection, (x, pack, *members), x, pack, bias, rows, *members)
    if not torch.is_grad_enabled():
        return F.linear(x, pack, bias)
    x, pack = _autocast(x), _autocast(pack)
    result: Tensor = _PackedProjection.apply(x, pack, None if bias is None else _autocast(bias), rows, *members)
    return result


def packed_projection_reference(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """`packed_projection` of members that stand under each other, as torch writes it: the oracle of its tests.

    >>> x, w, a = torch.randn(5, 3), torch.randn(4, 3), torch.randn(2, 3)
    >>> packed_projection_reference(x, [w, a], [None, None]).shape
    torch.Size([5, 6])
    """
    return torch.cat([F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], -1)


class _PackedProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pack: Tensor, bias: Tensor | None, rows: Sequence[Rows], *members: Tensor
    ) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x, pack, *members)
        return F.linear(x, pack, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, pack, *members = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        dx = dy @ pack if wanted[0] else None
        return dx, None, None, None, *_member_gradients(dy, x, ctx.rows, members, wanted[4:])


class _Unrolled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, up: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(z, up)
        return _unrolled(y, z, up, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, up = ctx.saved_tensors
        of_y, of_z, of_up, _ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dz = dup = None
        if of_z:
            dz = (ctx.scale * (rows @ up.to(rows.dtype))).to(z.dtype).view(z.shape)
        if of_up:
            dup = (ctx.scale * (rows.t() @ z.reshape(-1, z.shape[-1]).to(rows.dtype))).to(up.dtype)
        return dy if of_y else None, dz, dup, None


def _member_gradients(
    dy: Tensor, x: Tensor, rows: Sequence[Rows], members: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """``dy[:, rows]ᵀ @ x`` for what is wanted: one GEMM for members that stand under each other."""
    found: list[Tensor | None] = [None] * len(members)
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    for run in _runs(rows, members, wanted):
        first, last = rows[run[0]][0], rows[run[-1]][1]
        left = dy[:, first:last]
        whole = left.sum(0) if members[run[0]].dim() == 1 else left.t() @ x
        for index in run:
            start, stop, transposed = rows[index]
            part = whole[start - first : stop - first]
            found[index] = (part.t() if transposed else part).to(members[index].dtype)
    return found


def _runs(rows: Sequence[Rows], members: Sequence[Tensor], wanted: Sequence[bool]) -> Iterator[list[int]]:
    """Wanted members whose gradients are one matrix, or one vector: neighbours in rows."""
    run: list[int] = []
    for index in range(len(members)):
        if not wanted[index]:
            continue
        if run and (rows[run[-1]][1] != rows[index][0] or members[run[-1]].dim() != members[index].dim()):
            yield run
            run = []
        run.append(index)
    if run:
        yield run


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that autocast computes a GEMM in."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))
