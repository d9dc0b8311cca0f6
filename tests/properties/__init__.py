"""Random graphs with adapters in them, and what must be true of every one of them fused."""
