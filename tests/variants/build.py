"""The models of the matrix with their adapters, as PEFT's own interface makes them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from torch import Tensor, nn

from flora_fx import MixedAdapters
from flora_fx.quantized import QuantizedLinear
from tests.quantized.weights import affine

from .models import WIDTH, Attending, Convolutions, Experts, Linears, Tokens, Transposed, Wide

__all__ = ["Case"]

LINEARS = ["q", "k", "v", "o"]


class Case(NamedTuple):
    """A model with its adapters, and what it is called with."""

    model: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default


def values(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5, WIDTH)), dtype=torch.float64)


def trained(model: Any) -> Any:
    """The model in float64, its adapters moved from where they began (many B's are zero there)."""
    model.double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.4 * torch.randn_like(parameter)
    return model


def config(**options: Any) -> peft.LoraConfig:
    """Scale 4/3, rank 3."""
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 4, "target_modules": LINEARS, **options})


def lora(
    base: Callable[[], nn.Module] = Linears, inputs: Callable[[], Tensor] = values, **options: Any
) -> Callable[[], Case]:
    """A LoRA with some options."""
    return lambda: Case(trained(peft.get_peft_model(base(), config(**options))), (inputs(),))


def other(settings: Any) -> Callable[[], Case]:
    """Another method of PEFT's."""
    return lambda: Case(trained(peft.get_peft_model(Linears(), settings())), (values(),))


def two_layers() -> nn.Module:
    return Linears(2)


def transposed(**options: Any) -> Callable[[], Case]:
    return lora(Transposed, target_modules=["qkv", "o"], fan_in_fan_out=True, **options)


def tokens(**options: Any) -> Callable[[], Case]:
    return lora(Tokens, lambda: torch.randint(0, 11, (2, 5)), **{"target_modules": ["table", "o"], **options})


def convolutions(dimensions: int, **options: Any) -> Callable[[], Case]:
    shape = (2, 6, *[5] * dimensions)
    return lora(lambda: Convolutions(dimensions), lambda: values(*shape), target_modules=["conv", "o"], **options)


def attending(*targets: str) -> Callable[[], Case]:
    return lora(Attending, target_modules=list(targets))


def experts() -> Callable[[], Case]:
    parameters = ["experts.up", "experts.down"]
    return lora(Experts, target_modules=["router", "o"], target_parameters=parameters)


def several(**second: Any) -> Case:
    """Two adapters, both active."""
    model = peft.get_peft_model(Linears(), config(), adapter_name="a")
    model.add_adapter("b", config(**{"r": 2, "lora_alpha": 5, "target_modules": ["q", "o"], **second}))
    model.base_model.set_adapter(["a", "b"])
    return Case(trained(model), (values(),))


def in_one_batch() -> Case:
    """Two adapters, each for one row of the batch."""
    model = peft.get_peft_model(Linears(), config(), adapter_name="a")
    model.add_adapter("b", config(r=2))
    model.base_model.set_adapter(["a", "b"])  # so that both are trainable
    return Case(trained(model), (values(),), {"adapter_names": ["a", "b"]})


def mixed() -> Case:
    """The same as one graph."""
    case = in_one_batch()
    return Case(MixedAdapters(case.model, ["a", "b"]), case.args, {"adapter_ids": torch.tensor([0, 1])})


def merged() -> Case:
    case = lora()()
    case.model.merge_adapter()
    return case


def disabled() -> Case:
    case = lora()()
    case.model.base_model.disable_adapter_layers()
    return case


def for_hot_swap() -> Case:
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    case = lora()()
    prepare_model_for_compiled_hotswap(case.model, target_rank=5)
    return Case(case.model.double(), case.args)


def eva() -> Case:
    model = peft.get_peft_model(Linears(), config(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)))
    batches = [{"x": torch.randn(8, 5, WIDTH)} for _ in range(4)]
    peft.initialize_lora_eva_weights(
        model,
        batches,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda read, *_: (read[0] if isinstance(read, tuple) else read).flatten(0, -2),
        show_progress_bar=False,
    )
    return Case(trained(model), (values(),))


def corda() -> Case:
    from peft.tuners.lora.corda import preprocess_corda

    base, settings = Linears(), config(init_lora_weights="corda", corda_config=CordaConfig())
    preprocess_corda(base, settings, run_model=lambda: base(torch.randn(64, WIDTH)))
    return Case(trained(peft.get_peft_model(base, settings)), (values(),))


def lora_ga() -> Case:
    from peft.tuners.lora.loraga import preprocess_loraga

    base, settings = Linears(), config(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(base, settings, lambda: base(torch.randn(8, WIDTH)).square().sum().backward())
    return Case(trained(peft.get_peft_model(base, settings)), (values(),))


class Pooled(peft.tuners.lora.Linear):
    """PEFT offers QALoRA on GPTQ's layers alone; this is the same variant on a dense one."""

    def resolve_lora_variant(self, **_: Any) -> Any:
        from peft.tuners.lora.variants import QALoraLinearVariant

        return QALoraLinearVariant()


def qalora() -> Case:
    settings = config(use_qalora=True, qalora_group_size=2)
    settings._register_custom_module({nn.Linear: Pooled})
    return Case(trained(peft.get_peft_model(Linears(), settings)), (values(),))


def arrow() -> Case:
    model = peft.get_peft_model(Linears(), config(), adapter_name="a")
    model.add_adapter("b", config())
    routing = ArrowConfig(top_k=1)
    routing.task_adapter_names, routing.gks_adapter_names = ["a", "b"], []
    model.base_model.set_adapter(["a", "b"])
    trained(model)
    model.add_adapter("router", config(arrow_config=routing))
    model.set_adapter("router")
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(".a." in key or ".b." in key)
    with torch.no_grad():
        model.double()(values())  # it makes its prototypes in its first call
    return Case(model, (values(),))


def kasa() -> Callable[[], Case]:
    return lora(kasa_config=KasaConfig())


def velora() -> Callable[[], Case]:
    return lora(velora_config=VeloraConfig(num_groups=2, init_type="random"))


def monteclora() -> Callable[[], Case]:
    return lora(monteclora_config=MontecloraConfig(num_samples=2, buffer_size=4))


def bdlora() -> Callable[[], Case]:
    blocks = BdLoraConfig(target_modules_bd_a=["o"], target_modules_bd_b=["q", "k", "v"], nblocks=2)
    return lora(r=4, use_bdlora=blocks)


def adalora() -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2, lora_alpha=3, target_modules=LINEARS
    )


def small_llama() -> Any:
    import transformers as hf

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=31, use_cache=False))


def sentence(model: Any) -> Case:
    return Case(trained(model), (), {"input_ids": torch.randint(1, 31, (2, 5))})


def ffba(placement: str) -> Callable[[], Case]:
    from flora_fx.adapters import FloraConfig

    settings = {"r": 3, "alpha": 4, "placement": placement}
    return lambda: sentence(peft.get_peft_model(small_llama(), FloraConfig(**settings)))


def xlora() -> Case:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("0", "1"):  # X-LoRA numbers them itself
            one = peft.get_peft_model(small_llama(), config(target_modules=["q_proj", "v_proj"]))
            trained(one).save_pretrained(Path(folder) / name)
        adapters = {name: str(Path(folder) / name) for name in ("0", "1")}
        settings = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=24, adapters=adapters, xlora_dropout_p=0.0)
        return sentence(peft.get_peft_model(small_llama(), settings))


def torchao_int8() -> Case:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = Wide()
    quantize_(base, Int8WeightOnlyConfig())
    return on_quantized(base)


def torchao_int4() -> Case:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    base = Wide()
    quantize_(base, Int4WeightOnlyConfig(group_size=32))
    return on_quantized(base)


def bitsandbytes(bits: int) -> Callable[[], Case]:
    def make() -> Case:
        import bitsandbytes as bnb

        base = Wide()
        for name, layer in list(base.named_children()):
            sizes = (layer.in_features, layer.out_features, layer.bias is not None)
            if bits == 8:
                new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            else:
                new = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32)
                new.support_avx512bf16_for_cpu = False  # where a CPU has it, it computes in bfloat16
            new.load_state_dict(layer.state_dict())
            setattr(base, name, new.to("cpu"))
        base.is_loaded_in_8bit, base.is_loaded_in_4bit = bits == 8, bits == 4
        return on_quantized(base)

    return make


def checkpoint(act_order: bool) -> Callable[[], Case]:
    """A base as `flora_fx.checkpoint.load_model` reads it from quantized files."""

    def make() -> Case:
        base, order = Wide(), torch.randperm(64) if act_order else None
        for seed, (name, layer) in enumerate(list(base.named_children())):
            weight, _ = affine(layer.out_features, 64, order=order, seed=seed)
            setattr(base, name, QuantizedLinear(weight, layer.bias))
        case = on_quantized(base.double())
        return Case(case.model.double(), (torch.randn(2, 5, 64, dtype=torch.float64),))

    return make


def on_quantized(base: nn.Module) -> Case:
    model = peft.get_peft_model(base, config(target_modules=["q", "k"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return Case(model, (torch.randn(2, 5, 64),))
