"""Find the blocks of a transformer: attention and MLP, by the names of their projections.

block        first projections (read x)     last projection (reads u, writes the block's output)
attention    q, k, v, or all in one         o
MLP          gate, up, or all in one        down
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from flora_fx.errors import AdapterError

from .config import BLOCKS, FloraConfig

__all__ = ["Block", "find_blocks"]

# kind, first projections, last projection: relative to a layer.
_PATTERNS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"),
    ("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"),
    ("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.dense"),
    ("attention", ("self_attn.qkv_proj",), "self_attn.o_proj"),
    ("attention", ("attn.c_attn",), "attn.c_proj"),
    ("attention", ("attention.query_key_value",), "attention.dense"),
    ("attention", ("self_attention.query_key_value",), "self_attention.dense"),
    ("attention", ("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense"),
    ("attention", ("attention.q_lin", "attention.k_lin", "attention.v_lin"), "attention.out_lin"),
    ("mlp", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    ("mlp", ("mlp.gate_up_proj",), "mlp.down_proj"),
    ("mlp", ("mlp.c_fc",), "mlp.c_proj"),
    ("mlp", ("mlp.fc1",), "mlp.fc2"),
    ("mlp", ("fc1",), "fc2"),
    ("mlp", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    ("mlp", ("intermediate.dense",), "output.dense"),
    ("mlp", ("ffn.lin1",), "ffn.lin2"),
)

# The norms that attention and MLP read through, where all of a layer's norms are these.
_NORMS: tuple[dict[str, str], ...] = (
    {"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
    {"attention": "input_layernorm", "mlp": "pre_feedforward_layernorm"},
    {"attention": "ln_1", "mlp": "ln_2"},
    {"attention": "self_attn_layer_norm", "mlp": "final_layer_norm"},
)
_AFTER = {"post_attention_layernorm", "post_feedforward_layernorm"}


@dataclass(frozen=True)
class Block:
    """Attention or MLP of one layer; all names are those of modules of the model.

    Attributes:
        kind: ``"attention"`` or ``"mlp"``.
        stack: the list of layers it belongs to.
        layer: its layer's index there.
        first: the projections that read the block's input.
        last: the projection that writes its output.
        norm: the norm that makes the block's input of the residual stream; empty where there is none before it.
    """

    kind: str
    stack: str
    layer: int
    first: tuple[str, ...]
    last: str
    norm: str


def find_blocks(model: nn.Module, config: FloraConfig) -> list[Block]:
    """The blocks that a configuration asks for, in the order they run.

    Args:
        model: a transformers model, with or without adapters on it.
        config: which blocks, and of which layers.

    Raises:
        AdapterError: a kind of block, or a layer, that the model does not have; the message names what was looked for.
    """
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = [block for name, stack in stacks for block in _blocks(name, stack)]
    _tell_of_gaps(stacks, found, config)
    for kind in config.blocks:
        if not any(block.kind == kind for block in found):
            looked = "; ".join(f"{', '.join(first)} with {last}" for k, first, last in _PATTERNS if k == kind)
            others = [other for other in BLOCKS if other != kind and any(block.kind == other for block in found)]
            remedy = f"Leave it out: FloraConfig(blocks={others!r})." if others else "Use LoRA for this architecture."
            raise AdapterError(
                f"{type(model).__name__} has no {kind} block that FFBA knows. In each layer was looked for: {looked}. "
                f"{remedy}"
            )
    wanted = [block for block in found if block.kind in config.blocks]
    if config.layers is None:
        return wanted
    missing = sorted(set(config.layers) - {block.layer for block in wanted})
    if missing:
        raise AdapterError(
            f"FloraConfig.layers lists {missing}; {type(model).__name__} has layers 0 to "
            f"{max(block.layer for block in wanted)}"
        )
    return [block for block in wanted if block.layer in config.layers]


def _blocks(name: str, stack: nn.ModuleList) -> Iterator[Block]:
    for index, layer in enumerate(stack):
        prefix = f"{name}.{index}"
        norms = _norms(layer)
        for kind in BLOCKS:
            for of, first, last in _PATTERNS:
                if of == kind and all(_has(layer, path) for path in (*first, last)):
                    named = tuple(f"{prefix}.{path}" for path in first)
                    norm = f"{prefix}.{norms[kind]}" if kind in norms else ""
                    yield Block(kind, name, index, named, f"{prefix}.{last}", norm)
                    break


def _tell_of_gaps(stacks: list[tuple[str, nn.ModuleList]], found: list[Block], config: FloraConfig) -> None:
    """Layers of another kind (a mixture of experts, say) among those that are known get no adapter: say so."""
    for (name, stack), kind in itertools.product(stacks, config.blocks):
        there = {block.layer for block in found if block.stack == name and block.kind == kind}
        wanted = set(range(len(stack))) & set(range(len(stack)) if config.layers is None else config.layers)
        if there and (missing := sorted(wanted - there)):
            warnings.warn(
                f"{name} has no {kind} block that FFBA knows in layers {missing}: they get none", stacklevel=2
            )


def _norms(layer: nn.Module) -> dict[str, str]:
    """The names of the norms before a layer's blocks; none for a layer that normalises after them."""
    there = {name for name, _ in layer.named_children() if "norm" in name or name.startswith("ln_")}
    for norms in _NORMS:
        before = set(norms.values())
        # Under OPT's names BART, and OPT 350m, normalise after their blocks.
        known = norms is not _NORMS[-1] or getattr(layer, "do_layer_norm_before", False)
        if known and before <= there and there - before <= _AFTER:
            return norms
    return {}


def _has(module: nn.Module, path: str) -> bool:
    for part in path.split("."):
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            return False
        module = child
    return True
