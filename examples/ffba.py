"""FFBA: adapters made to be fused. Attach them, train a few steps, fuse, and count the GEMMs beside a LoRA's.

    python examples/ffba.py

prints GEMMs a layer: the base's, a LoRA's and those of two placements of FFBA, as written and fused.
"""

import copy

import peft
import torch
import transformers

import flora_fx
from flora_fx.adapters import FloraConfig

torch.manual_seed(0)
config = transformers.LlamaConfig(
    hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, vocab_size=97, use_cache=False
)
base = transformers.LlamaForCausalLM(config)
ids = torch.randint(97, (2, 7))
adapters = {
    "LoRA": peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    "FFBA shared": FloraConfig(r=8, alpha=16, placement="shared"),
    "FFBA block": FloraConfig(r=8, alpha=16, placement="block"),
}

counts = {}
for name, config in adapters.items():
    model = peft.get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    graph = flora_fx.capture(model.eval().requires_grad_(False), ids)
    fused = flora_fx.fuse(graph)
    report = flora_fx.report(fused)
    counts[name] = (report.ops_before["gemm"], report.ops_after["gemm"])
    print(f"{name:12} {flora_fx.verify(graph, fused, ids)}")

print("\nGEMMs of a layer and the head      as written   fused")
for name, (before, after) in counts.items():
    print(f"{name:34} {before:10} {after:7}")
print(f"{'the base alone':34} {7 + 1:10}")
