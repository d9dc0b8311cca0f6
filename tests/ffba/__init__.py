"""FFBA adapters as a PEFT method: what they compute, and that PEFT treats them as its own."""
