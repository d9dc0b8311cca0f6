"""How others hold quantized weights, a file a format: each gives a `QuantizedWeight` of the same numbers."""
