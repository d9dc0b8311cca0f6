"""Accuracy of LoRA, of FFBA adapters and of full fine-tuning at equal budgets."""
