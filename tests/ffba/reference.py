"""FFBA written once more, from the equations alone: hooks on a plain base model that nothing was attached to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import peft
import torch
import transformers as hf
from torch import Tensor, nn

from flora_fx.adapters import FloraConfig
from tests.architectures import MODELS, VOCAB

LAYERS = 2
"""Of every model here."""


class Layout(NamedTuple):
    """The names of a layer's projections (the last of each block writes the block's output) and norms."""

    layer: str
    attention: str
    mlp: str
    norms: tuple[str, str] | None = None


_LLAMA = Layout(
    "model.layers.{}.",
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
    "mlp.gate_proj mlp.up_proj mlp.down_proj",
    ("input_layernorm", "post_attention_layernorm"),
)
_GEMMA = _LLAMA._replace(norms=("input_layernorm", "pre_feedforward_layernorm"))
_ENCODER = Layout(
    "encoder.layer.{}.",
    "attention.self.query attention.self.key attention.self.value attention.output.dense",
    "intermediate.dense output.dense",
)
_PACKED = Layout(
    "transformer.h.{}.",
    "self_attention.query_key_value self_attention.dense",
    "mlp.dense_h_to_4h mlp.dense_4h_to_h",
)
LAYOUTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "phi": Layout(
        "model.layers.{}.",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense",
        "mlp.fc1 mlp.fc2",
    ),
    "phi3": _LLAMA._replace(attention="self_attn.qkv_proj self_attn.o_proj", mlp="mlp.gate_up_proj mlp.down_proj"),
    "gpt2": Layout("transformer.h.{}.", "attn.c_attn attn.c_proj", "mlp.c_fc mlp.c_proj", ("ln_1", "ln_2")),
    "opt": Layout(
        "model.decoder.layers.{}.",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj",
        "fc1 fc2",
        ("self_attn_layer_norm", "final_layer_norm"),
    ),
    "gpt_neox": _PACKED._replace(
        layer="gpt_neox.layers.{}.",
        attention="attention.query_key_value attention.dense",
        norms=("input_layernorm", "post_attention_layernorm"),
    ),
    "falcon": _PACKED,
    "bloom": _PACKED._replace(norms=("input_layernorm", "post_attention_layernorm")),
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "distilbert": Layout(
        "transformer.layer.{}.",
        "attention.q_lin attention.k_lin attention.v_lin attention.out_lin",
        "ffn.lin1 ffn.lin2",
    ),
}
"""By family: what FFBA has to find."""

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": lambda z: z.clamp(min=0),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "tanh": lambda z: (torch.exp(2 * z) - 1) / (torch.exp(2 * z) + 1),
}

PLACES: dict[str, dict[str, Any]] = {
    "block": {"placement": "block"},
    "forward": {"placement": "block", "ends": "forward"},
    "backward": {"placement": "block", "ends": "backward"},
    "shared": {"placement": "shared"},
    "cross": {"placement": "cross"},
}
"""Every way to place an adapter."""


def paths(family: str, place: str, blocks: tuple[str, ...], layers: tuple[int, ...]) -> list[tuple[str, list[str]]]:
    """What is read, and what is written: names of modules."""
    layout, found = LAYOUTS[family], []
    for layer in layers:
        for kind, names in (("attention", layout.attention), ("mlp", layout.mlp)):
            if kind in blocks:
                prefix = layout.layer.format(layer)
                *first, last = [prefix + name for name in names.split()]
                norm = "" if layout.norms is None else prefix + layout.norms[kind == "mlp"]
                found.append((norm, first, last))
    if place == "cross":
        return [(found[i][2], found[i + 1][1]) for i in range(len(found) - 1)]
    written = {"block": lambda f, o: [o], "backward": lambda f, o: [o], "forward": lambda f, o: f}
    written["shared"] = lambda f, o: [*f, o]
    return [(norm if place == "backward" else first[0], written[place](first, last)) for norm, first, last in found]


@contextmanager
def by_hand(
    base: nn.Module,
    family: str,
    weights: dict[str, Tensor],
    scale: float,
    place: str = "block",
    activation: str | None = None,
    blocks: tuple[str, ...] = ("attention", "mlp"),
    layers: tuple[int, ...] = tuple(range(LAYERS)),
    dropped: Callable[[str, Tensor], Tensor] = lambda _, x: x,
) -> Iterator[None]:
    """While open, a base model computes what its adapted one has to.

    Args:
        base: without adapters.
        family: a key of LAYOUTS.
        weights: of the adapter: "NAME OF A MODULE.A" or ".B"; all of them must be used.
        scale: what B z is multiplied by.
        place: a key of PLACES.
        activation: a key of ACTIVATIONS.
        blocks: the kinds of blocks.
        layers: the indices of layers.
        dropped: dropout, given the reader's name and what is read.
    """
    unused = dict(weights)
    values: dict[str, Tensor] = {}

    def read(reader: str, a: Tensor) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            values[reader] = ACTIVATIONS[activation](dropped(reader, args[0]) @ a.T)

        return hook

    def write(reader: str, b: Tensor) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
            return y + scale * (values[reader] @ b.T).reshape(y.shape)  # OPT's MLP is given two dimensions

        return hook

    with ExitStack() as hooks:
        for reader, writers in paths(family, place, blocks, layers):
            module = base.get_submodule(reader)
            hooks.callback(module.register_forward_pre_hook(read(reader, unused.pop(f"{reader}.A"))).remove)
            for writer in writers:
                module = base.get_submodule(writer)
                hooks.callback(module.register_forward_hook(write(reader, unused.pop(f"{writer}.B"))).remove)
        assert not unused, f"the adapter has weights that no equation names: {sorted(unused)}"
        yield


def weights_of(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """An adapter's parameters themselves, named as `by_hand` takes them."""
    found = {}
    for name, parameter in model.named_parameters():
        for end in "AB":
            module, separator, rest = name.partition(f".flora_{end}.{adapter}.")
            if separator:
                assert rest == "weight"
                found[f"{module.removeprefix('base_model.model.')}.{end}"] = parameter
    return found


_SIZES: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MORE: dict[str, Any] = {
    "gemma": lambda: hf.GemmaForCausalLM(
        hf.GemmaConfig(**_SIZES, **_IDS, intermediate_size=80, num_key_value_heads=2, head_dim=16)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_SIZES, **_IDS, intermediate_size=80, num_key_value_heads=2, head_dim=16)
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_SIZES, **_IDS, intermediate_size=80)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZES, **_IDS, intermediate_size=80)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_SIZES, **_IDS)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=48, n_layer=LAYERS, n_head=4, **_IDS)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**_SIZES, **_IDS, intermediate_size=80)),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(dim=48, hidden_dim=80, n_layers=LAYERS, n_heads=4, **_IDS)
    ),
}


def base_model(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """Random weights, norms and biases too, that differ enough from 1 and 0 to matter; in eval mode."""
    model = (MODELS | _MORE)[family]().eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


SCALE = 7 / 3
"""Of an adapter that `attach` makes."""


def attach(base: nn.Module, adapter: str = "default", **fields: Any) -> Any:
    """A copy of a base model with an adapter; where nothing else is said B is not zero, and the scale is 7/3."""
    config = FloraConfig(**({"r": 3, "alpha": 7, "init": "random"} | fields))
    return peft.get_peft_model(copy.deepcopy(base), config, adapter_name=adapter).eval()


def tokens(rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    """Token ids that are no special ones."""
    ids = torch.randint(3, VOCAB, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden state."""
    return model(**inputs)[0]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Within a share of the largest entry."""
    error, size = float((found - expected).detach().abs().max()), float(expected.detach().abs().max())
    assert error <= tolerance * size, f"off by {error:.1e} of {size:.1e}"


def assert_differ(found: Tensor, other: Tensor) -> None:
    """By so much that `assert_close` would not mistake one for the other."""
    assert float((found - other).detach().abs().max()) > 1e-3 * float(other.detach().abs().max())
