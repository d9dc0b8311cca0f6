"""`QuantizedLinear`: a linear layer whose weight is held quantized."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flora_fx.ops import autocasts

from .ops import quantized_linear
from .weight import Kind, QuantizedWeight

__all__ = ["QuantizedLinear"]


class QuantizedLinear(nn.Linear):
    """``y = x Wᵀ + bias`` over a frozen weight that is held as codes, scales and zero points.

    It is an `nn.Linear` for whoever looks for linear layers: PEFT puts adapters beside it. As in bitsandbytes its
    ``weight`` is the codes, [bytes, 1], to which nothing can be added; `dequantize` computes one of numbers. Codes,
    scales, zeros and order are buffers; ``.to(dtype)`` and the like convert the bias alone, since scales of another
    dtype would be other weights.

    Args:
        weight: the weight.
        bias: [out], kept as it is given; None for none.

    Attributes:
        compute_dtype: in which PEFT makes adapters beside it; it computes in its input's dtype.

    Example:

    >>> weight = QuantizedWeight("affine", 4, 2, torch.tensor([[0x98, 0x07]], dtype=torch.uint8),
    ...     torch.tensor([[0.5, 2.0]]), None, None, (1, 3), torch.float32, "by hand")
    >>> QuantizedLinear(weight)(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[-5.]])
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.kind: Kind = weight.kind
        self.bits, self.block = weight.bits, weight.block
        self.dtype, self.source = weight.dtype, weight.source
        self.compute_dtype = weight.dtype
        for name in _PARTS:
            self.register_buffer(name, getattr(weight, name))
        if isinstance(bias, Tensor) and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """See `flora_fx.quantized.ops.quantized_linear`; under autocast in its dtype, as `nn.Linear`."""
        if autocasts(input.device.type) and input.is_floating_point() and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(input.device.type))
        of = (self.kind, self.bits, self.block, self.out_features)
        result: Tensor = quantized_linear(input, self.codes, self.scales, self.zeros, self.order, self.bias, *of)
        return result

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The codes, uint8 [bytes, 1]: what PEFT asks for a device."""
        return self.codes.reshape(-1, 1)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight as it is held."""
        parts = {name: getattr(self, name) for name in _PARTS}
        shape = (self.out_features, self.in_features)
        return QuantizedWeight(
            self.kind, self.bits, self.block, **parts, shape=shape, dtype=self.dtype, source=self.source
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The same layer with plain weights.

        Args:
            dtype: of the weights; None for what the source dequantizes to.
        """
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight = nn.Parameter(self.quantized.dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            plain.bias = self.bias if dtype is None else nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return plain.train(self.training)

    def reset_parameters(self) -> None:
        """Nothing: a quantized weight is never drawn at random."""

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.source}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """`.to()`, `.half()`, `.cuda()`, …: scales move and keep their dtype."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self


_PARTS = ("codes", "scales", "zeros", "order")
