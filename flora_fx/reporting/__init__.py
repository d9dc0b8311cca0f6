"""What was fused and what was not, as text, JSON and pictures."""
