"""Families of transformers and diffusers with a LoRA on every linear layer: docs/architectures.md, and its proof."""
