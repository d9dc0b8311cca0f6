"""Every variant of LoRA that PEFT has, and what becomes of it: the table of docs/variants.md, and its proof."""
