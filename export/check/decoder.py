"""Compare an exported causal LM with the PyTorch model that it was made from.

The export runs first, all of it: a prompt, greedy tokens, and the steps of `crossing`. It is closed before PyTorch
begins, so that the two never stand in memory side by side. PyTorch then runs the whole text once, which tells what each
of its tokens had to be; step by step only where rotary positions, masks or scales change within that text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.errors import require
from flora_fx.storage.casting import read_all
from flora_fx.storage.mapped import give_back

from ..directory.manifest import Manifest
from ..run.decoder import Decoder
from ..run.kv_memory import PAST, PRESENT
from .crossing import Crossings, Signature, compare_steps, find_crossings, step_inputs
from .differences import Check, Differences, own_config, same_tokens

__all__ = ["check_decoder", "precision", "run_model"]

_NEW_TOKENS = 16
_COMPARED = 2
"""Of so many new tokens all logits are compared, of the others which is the largest: in half precision differences add
up from token to token."""


@dataclass(frozen=True)
class _Found:
    """What an export gave.

    Attributes:
        ids, mask: the prompts [2, 7], one padded on the left.
        prompt: their logits [2, 7, vocab].
        text: they and the tokens that follow, [2, 7 + new].
        logits: of each of these tokens, [2, vocab].
        steps: see `compare_steps`.
        signature: of the graph's inputs.
        checked_on: where it ran.
    """

    ids: Tensor
    mask: Tensor
    prompt: Tensor
    text: Tensor
    logits: tuple[Tensor, ...]
    steps: Mapping[int, Tensor]
    signature: Signature
    checked_on: str


def check_decoder(opened: Callable[[], Decoder], model: nn.Module) -> Check:
    """Compare the logits of a prompt, those of the greedy tokens that follow, the tokens, and what `crossing` says.

    Args:
        opened: opens the export.
        model: the unfused transformers model in the export's dtype, in eval mode; its weights are read, see `read_all`.

    Raises:
        ExportError: they do not agree.
    """
    decoder = opened()
    manifest = decoder.manifest
    crossings = find_crossings(decoder.session.inputs, manifest, model)
    found = _run_export(decoder, crossings)
    del decoder
    give_back()
    read_all(model)
    differences = Differences(precision(manifest))
    if any(length < found.text.shape[1] for length in crossings.lengths):
        equal = _compare_by_steps(found, manifest, model, differences)
    else:
        equal = _compare_at_once(found, manifest, model, differences)
    return Check(
        differences.max_abs, differences.max_rel, equal, found.checked_on, crossings.crossed, crossings.not_crossed
    )


def _run_export(decoder: Decoder, crossings: Crossings) -> _Found:
    manifest, session = decoder.manifest, decoder.session
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, manifest.vocab_size, (2, 7), generator=random)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # the second prompt is shorter
    prompt = decoder(ids, mask)
    text: Tensor = ids
    logits: tuple[Tensor, ...] = ()
    count = min(_NEW_TOKENS, manifest.max_positions - ids.shape[1]) if manifest.max_positions else _NEW_TOKENS
    if count > 0:
        generated = decoder.generate(
            ids, mask, max_new_tokens=count, eos_token_id=[], return_dict_in_generate=True, output_logits=True
        )
        text, logits = generated.sequences, tuple(step.cpu() for step in generated.logits or ())
    keep = [name.replace(PAST, PRESENT) for name in session.inputs if name.startswith(PAST)]
    steps = {
        total: session.run(dict(step_inputs(session.inputs, manifest, total)), keep=keep)["logits"]
        for total in crossings.totals
    }
    where = f"{session.provider}, in a CUDA graph" if session.cuda_graph else session.provider
    return _Found(ids, mask, prompt, text, logits, steps, session.inputs, where)


def _compare_at_once(found: _Found, manifest: Manifest, model: nn.Module, differences: Differences) -> bool:
    """With one run over the text: where it says what each token had to be, it says what greedy generation takes."""
    from transformers import DynamicCache

    ids, given = found.ids, found.mask.bool()
    start, end = ids.shape[1], max(found.text.shape[1] - 1, ids.shape[1])
    mask = torch.cat([found.mask, found.mask.new_ones(len(ids), end - start)], 1)
    expected, _ = run_model(model, found.text[:, :end], mask, DynamicCache())
    differences.add("the logits of a prompt", found.prompt[given], expected[:, :start][given])
    wanted = [expected[:, start - 1 + index] for index in range(len(found.logits))]
    for logits, those in list(zip(found.logits, wanted, strict=True))[:_COMPARED]:
        differences.add("the logits of the next token", logits, those)
    compare_steps(found.steps, found.signature, manifest, model, partial(run_model, model), differences)
    tokens = [those.argmax(-1, keepdim=True) for those in wanted]
    return same_tokens(found.text, torch.cat([ids, *tokens], 1), wanted, start, differences)


def _compare_by_steps(found: _Found, manifest: Manifest, model: nn.Module, differences: Differences) -> bool:
    """With transformers' own greedy generation."""
    transformers = require("transformers", "hf")
    ids, given = found.ids, found.mask.bool()
    expected, _ = run_model(model, ids, found.mask, transformers.DynamicCache())
    differences.add("the logits of a prompt", found.prompt[given], expected[given])
    # Before longer texts, which PyTorch's dynamic NTK scaling would remember.
    compare_steps(found.steps, found.signature, manifest, model, partial(run_model, model), differences)
    if not found.logits:
        return True
    device = next(model.parameters()).device
    plain = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=len(found.logits),
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with own_config(model, plain):
        out = model.generate(  # type: ignore[operator]
            ids.to(device), attention_mask=found.mask.to(device), generation_config=plain
        )
    tokens, start = out.sequences.cpu(), ids.shape[1]
    for index, (logits, those) in enumerate(list(zip(found.logits, out.logits, strict=True))[:_COMPARED]):
        alike = (found.text[:, : start + index] == tokens[:, : start + index]).all(1)
        differences.add("the logits of the next token", logits[alike], those.cpu()[alike])
    return same_tokens(found.text, tokens, out.logits, start, differences)


def precision(manifest: Manifest) -> str:
    """What the check's tolerance goes by."""
    return "int8" if manifest.base.get("activations") == "int8" else manifest.dtype


def run_model(model: nn.Module, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """PyTorch's logits of tokens behind a cache, with the positions that the mask counts, and the cache then.

    Args:
        model: a transformers causal LM.
        ids: [batch, seq].
        mask: [batch, total].
        cache: of transformers.
    """
    device = next(model.parameters()).device
    extra = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        extra["position_ids"] = positions[:, -ids.shape[1] :].to(device)
    out = model(
        input_ids=ids.to(device), attention_mask=mask.to(device), past_key_values=cache, use_cache=True, **extra
    )
    return out.logits.cpu(), out.past_key_values
