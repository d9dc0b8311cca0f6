"""From a fused program to an ONNX graph."""
