"""From a PEFT model to ONNX Runtime: export it, load it, generate, and swap another LoRA in.

    python examples/deploy.py

prints what was exported and how it was checked, and the tokens before and after the swap. The export stays in
example-output/exported.
"""

import peft
import torch
import transformers

from flora_fx.export import export_onnx, load

torch.manual_seed(0)
config = transformers.LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    vocab_size=97,
    max_position_embeddings=128,
)
base = transformers.LlamaForCausalLM(config)
lora = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
model = peft.get_peft_model(base, lora).eval()
model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
model.save_pretrained("example-output/loras", selected_adapters=["other"])  # writes loras/other

result = export_onnx(model, "example-output/exported", hot_swap=True, overwrite=True)
decoder = load("example-output/exported")
prompt = torch.tensor([[5, 6, 7]])
before = decoder.generate(prompt, max_new_tokens=12, eos_token_id=[])
decoder.load_adapter("example-output/loras/other")
after = decoder.generate(prompt, max_new_tokens=12, eos_token_id=[])

print(result)
print("\nthe adapter that was exported:", before[0].tolist())
print("the one that was swapped in:  ", after[0].tolist())
