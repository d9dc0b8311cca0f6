"""Whole generations from an exported directory, swaps between them, and what a host of replicas serves."""
