"""Train a LoRA through the backend, beside the same LoRA trained by PEFT: the same losses, fewer GEMMs.

    python examples/train.py

prints both loss curves. The task: each token is the one before it plus three.
"""

import copy

import peft
import torch
import transformers

torch.manual_seed(0)
config = transformers.LlamaConfig(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=1,
    num_attention_heads=4,
    vocab_size=16,
    initializer_range=0.2,
    use_cache=False,
)
base = transformers.LlamaForCausalLM(config)
lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
model = peft.get_peft_model(base, lora)
batches = [(torch.arange(0, 24, 3) + torch.randint(16, (8, 1))) % 16 for _ in range(40)]


def train(model: torch.nn.Module, run: torch.nn.Module) -> list[float]:
    """The loss of each step; `run` is the model, or what computes as the model does."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for ids in batches:
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


twin = copy.deepcopy(model)
by_peft = train(twin, twin)
by_flora = train(model, torch.compile(model, backend="flora"))  # the first step compiles

print("step   PEFT   flora")
for step in range(0, len(batches), 4):
    print(f"{step:4} {by_peft[step]:6.3f}  {by_flora[step]:6.3f} {'#' * round(20 * by_flora[step])}")
