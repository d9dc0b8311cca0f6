"""LoRAs as PEFT saves them, and the weights of an export that another LoRA may replace."""
