"""Time and peak memory of an adapter's training step."""
