"""The matrix: every variant, and what becomes of it. `test_variants` proves it, `page` writes it down."""

from __future__ import annotations

import peft

from flora_fx import Reason

from . import build
from .build import LINEARS, lora, other
from .row import (
    Fate,
    Row,
    declined,
    fused,
    in_place,
    left,
    made_of,
    partly,
    reads_another,
    refused,
    unscalable,
)

__all__ = ["ABSENT", "ROWS"]

ALL = (fused(4, 13, 5), fused(4, 13, 7), fused(4, 13, 7))
"""q, k, v and o adapted with one scale: two packs, two accumulations and the head; the backend has a B each."""
TWO_SCALES = (fused(4, 13, 6), *ALL[1:])
LATER = ("compiled", "trained")
NO_GRADIENT = refused("does not require grad", "nothing of it trains")
CUT = "Dynamo cuts PEFT's layer into graphs of a piece each"

VANILLA = [
    Row("LoRA", "vanilla", 'target_modules=["q", "k", "v", "o"]', lora(), *ALL),
    Row("LoRA", "one target", 'target_modules=["k"]', lora(target_modules=["k"]), *[fused(1, 7, 4)] * 3),
    Row(
        "LoRA",
        "every linear layer",
        'target_modules="all-linear"',
        lora(target_modules="all-linear"),
        fused(5, 15, 6),
        *[fused(5, 15, 8)] * 2,
    ),
    Row(
        "LoRA",
        "a pattern",
        r'target_modules=r".*\.(q|o)"',
        lora(target_modules=r".*\.(q|o)"),
        *[fused(2, 9, 5)] * 3,
        slow=LATER,
    ),
    Row(
        "LoRA",
        "all but one",
        'target_modules="all-linear", exclude_modules=["o"]',
        lora(target_modules="all-linear", exclude_modules=["o"]),
        *ALL,
        slow=LATER,
    ),
    Row(
        "LoRA",
        "some layers",
        "layers_to_transform=[1]",
        lora(build.two_layers, layers_to_transform=[1], layers_pattern="layers"),
        fused(4, 17, 9),
        *[fused(4, 17, 11)] * 2,
    ),
    Row("LoRA", "rank 1", "r=1", lora(r=1), *ALL, slow=LATER),
    Row("LoRA", "a rank above the layer's", "r=16", lora(r=16), *ALL, slow=LATER),
    Row("LoRA", "a rank for each sibling", "rank_pattern", lora(rank_pattern={"q": 5, "o": 1}), *TWO_SCALES),
    Row("LoRA", "a scale for each sibling", "alpha_pattern", lora(alpha_pattern={"v": 9}), *TWO_SCALES, slow=LATER),
    Row("LoRA", "rsLoRA", "use_rslora=True", lora(use_rslora=True), *ALL, slow=LATER),
    Row("LoRA", "bias on B", "lora_bias=True", lora(lora_bias=True), *ALL),
    Row("LoRA", "biases that train", 'bias="all"', lora(bias="all"), *ALL),
    Row(
        "LoRA",
        "dropout",
        "lora_dropout=0.3",
        lora(lora_dropout=0.3),
        *ALL[:2],
        declined((Reason.DROPOUT_ACTIVE, 4, "a random mask of its own; fuse in eval mode")),
    ),
    Row("LoRA", "a head that trains", 'modules_to_save=["head"]', lora(modules_to_save=["head"]), *ALL),
    Row(
        "LoRA", "several active adapters", "two, of other ranks", build.several, fused(6, 17, 8), *[fused(6, 17, 9)] * 2
    ),
    Row(
        "LoRA",
        "prepared for hot swapping",
        "prepare_model_for_compiled_hotswap",
        build.for_hot_swap,
        *[fused(4, 13, 7)] * 3,
    ),
    Row(
        "LoRA", "merged", "merge_adapter()", build.merged, *[left("there is no adapter in the graph")] * 2, NO_GRADIENT
    ),
    Row(
        "LoRA",
        "disabled",
        "disable_adapter_layers()",
        build.disabled,
        *[left("there is no adapter in the graph")] * 2,
        NO_GRADIENT,
    ),
]

_INIT = "Initialisations"
INITIALISATIONS = [
    Row(_INIT, "gaussian", 'init_lora_weights="gaussian"', lora(init_lora_weights="gaussian"), *ALL, slow=LATER),
    Row(
        _INIT,
        "orthogonal",
        'init_lora_weights="orthogonal"',
        lora(init_lora_weights="orthogonal", r=4),
        *ALL,
        slow=LATER,
    ),
    Row(_INIT, "PiSSA", 'init_lora_weights="pissa"', lora(init_lora_weights="pissa"), *ALL),
    Row(
        _INIT,
        "PiSSA, fast",
        'init_lora_weights="pissa_niter_4"',
        lora(init_lora_weights="pissa_niter_4"),
        *ALL,
        slow=LATER,
    ),
    Row(_INIT, "OLoRA", 'init_lora_weights="olora"', lora(init_lora_weights="olora"), *ALL),
    Row(_INIT, "EVA", 'init_lora_weights="eva"', build.eva, *ALL, slow=LATER),
    Row(_INIT, "CorDA", 'init_lora_weights="corda"', build.corda, *ALL, slow=LATER, needs="attr"),
    Row(_INIT, "LoRA-GA", 'init_lora_weights="lora_ga"', build.lora_ga, *ALL, slow=LATER),
    Row(_INIT, "MiCA", 'init_lora_weights="mica"', lora(init_lora_weights="mica"), *ALL, slow=LATER),
]

_LAYERS = "Other layers than nn.Linear"
OF_EXPORT = refused("could not trace", "torch.export does not trace it")
CONVOLUTION = partly(1, 3, 2, made_of(1, "conv"))
LAYERS = [
    Row(_LAYERS, "Conv1D of transformers", "fan_in_fan_out=True", build.transposed(), *[fused(2, 6, 4)] * 3),
    Row(
        _LAYERS,
        "Embedding",
        'target_modules=["table", "o"]',
        build.tokens(),
        *[partly(1, 4, 3, made_of(1, "embedding, matmul, mul"))] * 3,
    ),
    Row(
        _LAYERS,
        "tokens that train",
        "trainable_token_indices",
        build.tokens(target_modules=["o"], trainable_token_indices={"table": [1, 2]}),
        *[fused(1, 3, 2)] * 3,
    ),
    *(
        Row(
            _LAYERS,
            f"Conv{n}d",
            'target_modules=["conv", "o"]',
            build.convolutions(n),
            *[CONVOLUTION] * 3,
            slow=() if n == 2 else ("compiled", "trained"),
        )
        for n in (1, 2, 3)
    ),
    Row(
        _LAYERS,
        "nn.MultiheadAttention",
        'target_modules=["attention", "o"]',
        build.attending("attention", "o"),
        OF_EXPORT,
        Fate(1, why="PEFT merges the attention's adapter at each call, outside of graphs"),
        refused("set_ on a graph input", "torch.compile does not trace it, with any backend"),
        slow=LATER,
    ),
    Row(
        _LAYERS,
        "experts in one parameter",
        'target_parameters=["experts.up", "experts.down"]',
        build.experts(),
        partly(2, 12, 10, (Reason.WEIGHT_COMPUTED, 2, "makes a weight from several at each call; merge the adapter")),
        *[partly(2, 12, 10, why="PEFT adds the experts' adapters to their weights at each call, outside of graphs")]
        * 2,
        slow=LATER,
    ),
]

_VARIANTS = "Variants of LoRA"
VARIANTS = [
    Row(
        _VARIANTS,
        "DoRA",
        "use_dora=True",
        lora(use_dora=True),
        fused(4, 21, 5),
        *[declined(unscalable(4), why=CUT)] * 2,
        slow=LATER,
    ),
    Row(
        _VARIANTS,
        "DoRA on Conv1D of transformers",
        "use_dora=True, fan_in_fan_out=True",
        build.transposed(use_dora=True),
        fused(2, 10, 4),
        *[declined(unscalable(2), why=CUT)] * 2,
        slow=LATER,
    ),
    Row(
        _VARIANTS,
        "DoRA on Embedding",
        "use_dora=True",
        build.tokens(use_dora=True),
        partly(1, 7, 4, made_of(1, "matmul, detach, mul, add")),
        *[declined(unscalable(1), why=CUT)] * 2,
        slow=LATER,
    ),
    Row(
        _VARIANTS,
        "DoRA on Conv2d",
        "use_dora=True",
        build.convolutions(2, use_dora=True),
        partly(1, 6, 3, made_of(1, "mm, detach")),
        *[declined(unscalable(1), made_of(1, "mm, detach"), why=CUT)] * 2,
        slow=LATER,
    ),
    Row(_VARIANTS, "KaSA", "kasa_config", build.kasa(), *[fused(4, 13, 7)] * 3),
    Row(
        _VARIANTS,
        "VeLoRA",
        "velora_config",
        build.velora(),
        *ALL[:2],
        left("A is a function with a gradient of its own"),
    ),
    Row(
        _VARIANTS,
        "MonteCLoRA",
        "monteclora_config",
        build.monteclora(),
        *ALL[:2],
        left("A is drawn anew at each call"),
        slow=("trained",),
    ),
    Row(
        _VARIANTS,
        "aLoRA",
        "alora_invocation_tokens",
        lora(alora_invocation_tokens=[1]),
        *[declined(in_place(4))] * 2,
        refused("False != True", "torch.compile does not trace it, with any backend"),
        slow=LATER,
    ),
    Row(
        _VARIANTS,
        "Arrow",
        "arrow_config",
        build.arrow,
        declined(made_of(4, "matmul, abs, topk")),
        *[declined(made_of(4, "stack, tensor, einsum"))] * 2,
        slow=LATER,
    ),
    Row(
        _VARIANTS,
        "QALoRA",
        "use_qalora=True (its variant on dense layers)",
        build.qalora,
        partly(4, 13, 11, reads_another(4)),
        *[partly(4, 13, 13, reads_another(4))] * 2,
    ),
    Row(_VARIANTS, "BD-LoRA", "use_bdlora", build.bdlora(), *[declined(made_of(4, "einsum"))] * 3),
    Row(
        _VARIANTS,
        "an adapter for each row of a batch",
        "adapter_names",
        build.in_one_batch,
        partly(8, 21, 21, reads_another(8)),
        declined(in_place(8)),
        refused("when the model is in training mode", "PEFT refuses it"),
        slow=("compiled",),
    ),
    Row(
        _VARIANTS,
        "the same, in one graph",
        "flora_fx.MixedAdapters(model, names)",
        build.mixed,
        fused(8, 21, 5),
        fused(8, 21, 7),
        fused(8, 21, 11),
        slow=("compiled",),
    ),
    Row(
        _VARIANTS,
        "X-LoRA",
        "XLoraConfig, two LoRAs",
        build.xlora,
        partly(8, 33, 33, (Reason.WEIGHT_SHARED, 8, "is also used elsewhere")),
        *[partly(8, 33, 33, reads_another(8))] * 2,
        slow=LATER,
        tolerance=1e-6,
    ),
]

_OTHERS = "Other methods"
_DRAWN = (
    "PEFT draws a number in its loop over the adapters (dropout of whole layers): the graph breaks there, and the "
    "adapter is in a graph without its layer"
)
OTHERS = [
    *(
        Row(
            _OTHERS,
            f"FFBA, {placement}",
            f'FloraConfig(placement="{placement}")',
            build.ffba(placement),
            *fates,
            slow=LATER,
            tolerance=1e-6,
        )
        for placement, fates in {
            "shared": (fused(7, 17, 7), fused(7, 17, 7), fused(7, 17, 12)),
            "block": (fused(2, 12, 5), fused(2, 12, 5), fused(2, 12, 7)),
            "cross": (fused(2, 11, 7), fused(2, 11, 7), fused(2, 11, 10)),
        }.items()
    ),
    Row(
        _OTHERS,
        "AdaLoRA",
        "AdaLoraConfig",
        other(build.adalora),
        declined(made_of(4, "mul, matmul, add, div")),
        *[declined(made_of(4, "mul, matmul, add, truediv"))] * 2,
    ),
    Row(
        _OTHERS,
        "VeRA",
        "VeraConfig",
        other(lambda: peft.VeraConfig(r=3, target_modules=LINEARS)),
        declined(unscalable(1), made_of(3, "slice, linear, mul")),
        *[left("its A and B are buffers, of which all layers use parts")] * 2,
    ),
    Row(
        _OTHERS,
        "LoHa",
        "LoHaConfig",
        other(lambda: peft.LoHaConfig(r=3, alpha=4, target_modules=LINEARS)),
        *[declined(made_of(4, "matmul"))] * 2,
        left(_DRAWN),
        slow=("trained",),
    ),
    Row(
        _OTHERS,
        "LoKr",
        "LoKrConfig",
        other(lambda: peft.LoKrConfig(r=3, alpha=4, target_modules=LINEARS)),
        *[declined(made_of(4, "kron, mul, linear"))] * 2,
        left(_DRAWN),
        slow=("trained",),
    ),
    Row(
        _OTHERS,
        "IA³",
        "IA3Config",
        other(lambda: peft.IA3Config(target_modules=LINEARS, feedforward_modules=["o"])),
        *[left("it scales features and has no low-rank path")] * 3,
    ),
]

_QUANTIZED = "Quantized bases"
CODES = "the bases pack by their codes; the A's pack, the B's accumulate"
KERNEL = "the base keeps its kernel; the A's pack, each B accumulates"
NOT_DENSE = (Reason.WEIGHT_NOT_DENSE, 4, " stays ")
QUANTIZED = [
    Row(
        _QUANTIZED,
        "torchao int8, weights only",
        "Int8WeightOnlyConfig()",
        build.torchao_int8,
        Fate(2, (6, 3), why=CODES),
        *[partly(2, 6, 5, NOT_DENSE, why=KERNEL)] * 2,
        needs="torchao",
        tolerance=1e-6,
    ),
    Row(
        _QUANTIZED,
        "bitsandbytes 8 bits",
        "Linear8bitLt",
        build.bitsandbytes(8),
        OF_EXPORT,
        *[Fate(2, declines=(reads_another(2),), why=KERNEL)] * 2,
        needs="bitsandbytes",
        tolerance=1e-6,
    ),
    Row(
        _QUANTIZED,
        "bitsandbytes 4 bits",
        "Linear4bit",
        build.bitsandbytes(4),
        Fate(2, (6, 3), why=CODES),
        *[Fate(2, declines=(reads_another(2),), why=KERNEL)] * 2,
        needs="bitsandbytes",
        tolerance=1e-6,
    ),
]

QUANTIZED += [
    Row(
        _QUANTIZED,
        name,
        given,
        build.checkpoint(act_order),
        Fate(2, (6, 3), why=CODES),
        *[Fate(2, declines=(reads_another(2),), why=KERNEL)] * 2,
    )
    for name, given, act_order in (
        ("GPTQ with act-order, from a checkpoint", "QuantizedLinear", True),
        ("AWQ, compressed-tensors, from a checkpoint", "QuantizedLinear", False),
    )
]

ROWS: list[Row] = [*VANILLA, *INITIALISATIONS, *LAYERS, *VARIANTS, *OTHERS, *QUANTIZED]

ABSENT = {
    "torchao int4": "torchao 0.18 has no int4 kernel for this CPU without mslk",
    "LoftQ": "an initialisation like those above, on a base that bitsandbytes has quantized to 4 bits",
    "modules of GPTQModel, AQLM, EETQ, HQQ, INC, Transformer Engine": "their packages are not installed, or need a GPU",
    "Megatron layers": "need megatron-core",
}
"""What PEFT offers and this table does not hold, and why."""
