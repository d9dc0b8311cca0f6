"""The shortest way: torch.compile with the backend "flora", checked against PEFT.

    python examples/compile.py

prints what became of the adapters, and how far the compiled model and PEFT's own are from float64.
"""

import copy

import peft
import torch
import transformers

from flora_fx.backend import last_report

torch.manual_seed(0)
config = transformers.LlamaConfig(
    hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, vocab_size=97, use_cache=False
)
base = transformers.LlamaForCausalLM(config)
lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
model = peft.get_peft_model(base, lora).eval().requires_grad_(False)
ids = torch.randint(97, (2, 7))

compiled = torch.compile(model, backend="flora")  # this line is all that changes; the first call compiles

exact = copy.deepcopy(model).double()(ids).logits
errors = {
    name: float((run(ids).logits - exact).abs().max() / exact.abs().max())
    for name, run in {"PEFT": model, 'backend="flora"': compiled}.items()
}
print(last_report())
print("\nlargest error against float64, relative to the largest logit")
for name, error in errors.items():
    print(f"  {name:16} {error:.1e}")
