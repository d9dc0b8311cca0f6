"""A model as a graph: capture it, fuse its LoRA, see what became of each adapter, verify the numbers.

    python examples/graph.py

prints the report and the verification, and draws a layer before and after into example-output/layer.svg.
"""

from pathlib import Path

import peft
import torch
import transformers

import flora_fx

torch.manual_seed(0)
config = transformers.LlamaConfig(
    hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=97, use_cache=False
)
base = transformers.LlamaForCausalLM(config)
lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
model = peft.get_peft_model(base, lora).eval().requires_grad_(False)
ids = torch.randint(97, (2, 7))

graph = flora_fx.capture(model, ids)
fused = flora_fx.fuse(graph)
report = flora_fx.report(fused)
verification = flora_fx.verify(graph, fused, ids)

print(report)
print(verification)
Path("example-output").mkdir(exist_ok=True)
print("drawn:", report.draw("example-output/layer.svg"))
