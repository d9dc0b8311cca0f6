"""Linear layers whose weights are held in few bits, as they were trained on: read, called, taken apart."""

from .linear import QuantizedLinear
from .plain import dequantize
from .weight import Kind, QuantizedWeight

__all__ = ["Kind", "QuantizedLinear", "QuantizedWeight", "dequantize"]
