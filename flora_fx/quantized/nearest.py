"""Weights put into few bits on the spot, each number the nearest one: for measurements, demos and tests.

What a model was trained on comes from its own quantizer; see `flora_fx.quantized.formats` for those that are read.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from .linear import QuantizedLinear
from .weight import CODEBOOKS, Kind, QuantizedWeight, pack_codes

__all__ = ["nearest", "quantize_linears"]

Model = TypeVar("Model", bound=nn.Module)


def nearest(weight: Tensor, kind: Kind = "affine", *, bits: int = 4, block: int = 32) -> QuantizedWeight:
    """A weight in few bits.

    Args:
        weight: [out, in], of any floating-point dtype.
        kind: ``"affine"`` spreads the codes evenly from the smallest to the largest number of a block, 0 among them; a
            codebook is scaled to the largest magnitude of a block, as bitsandbytes does it.
        bits: of an affine code: 2, 4 or 8.
        block: neighbours that share a scale; of a codebook, in the flattened weight, whose size is a multiple of it.

    Returns:
        the weight, with scales in float32.

    >>> held = nearest(torch.tensor([[0.0, 1.0, 2.0, 15.0]]), block=4)
    >>> held.dequantize().tolist(), held.unpacked().tolist()
    ([[0.0, 1.0, 2.0, 15.0]], [[0, 1, 2, 15]])
    """
    plain = weight.detach().float()
    rows, columns = plain.shape
    shape = (rows, columns)
    if kind != "affine":
        book = torch.tensor(CODEBOOKS[kind])
        values, order = book.sort()
        blocks = plain.reshape(-1, block)
        largest = blocks.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        between = (values[1:] + values[:-1]) / 2
        codes = order[torch.bucketize(blocks / largest, between)].to(torch.uint8).reshape(-1, 2)
        source = f"{kind.upper()}, blocks of {block}, to the nearest"
        both = codes[:, 0] << 4 | codes[:, 1]
        return QuantizedWeight(kind, 4, block, both, largest.reshape(-1), None, None, shape, torch.float32, source)
    padded = nn.functional.pad(plain, (0, -columns % block)).reshape(rows, -1, block)
    low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    zeros = (-low / scales).round()
    whole = (padded / scales[..., None]).round() + zeros[..., None]
    codes = whole.clamp(0, 2**bits - 1).reshape(rows, -1)[:, :columns]
    source = f"{bits} bits, groups of {block}, to the nearest"
    held = pack_codes(codes.to(torch.int64), bits, block)
    return QuantizedWeight(
        "affine", bits, block, held, scales, zeros.to(torch.uint8), None, shape, torch.float32, source
    )


def quantize_linears(model: Model, kind: Kind = "affine", *, bits: int = 4, block: int = 32) -> Model:
    """Put a transformers model's linear layers into few bits, in place; its head stays as it is.

    Args:
        model: without adapters.
        kind, bits, block: see `nearest`.

    Returns:
        the model.

    >>> layers = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> print(quantize_linears(layers, block=4))
    Sequential(
      (0): QuantizedLinear(in_features=4, out_features=3, 4 bits, groups of 4, to the nearest)
      (1): ReLU()
    )
    """
    find = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and not isinstance(layer, QuantizedLinear) and layer is not head:
            weight = nearest(layer.weight, kind, bits=bits, block=block)
            model.set_submodule(name, QuantizedLinear(weight, layer.bias))
    return model
